"""SSL and SSB against worked numbers, IA3 and peft."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn
from torch.testing import assert_close

from prunepeft.errors import ConfigError
from prunepeft.kinds import make_kind
from prunepeft.space import Site
from tests.one_layer import as_matrix, make_layer, own_params, perturb

W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
L = torch.tensor([2.0, 0.5])
S = torch.tensor([1.0, 0.0, -1.0])


def test_tiny_numbers() -> None:
    left = make_layer("ssl", weight=W, params={"l": L})
    assert_close(as_matrix(left)[0], torch.tensor([[2.0, 1], [6, 2], [10, 3]]).double())
    both = make_layer("ssb", weight=W, params={"l": L, "s": S})
    assert_close(as_matrix(both)[0], torch.tensor([[2.0, 1], [0, 0], [-10, -3]]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ssl", "ssb"])
def test_bitwise_identity_at_start(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind).to(dtype)
    x = torch.randn(4, 12).to(dtype)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("scale_bias", [False, True])
def test_bias(scale_bias: bool) -> None:
    layer = perturb(make_layer("ssb", scale_bias=scale_bias))
    bias = layer.get_base_layer().bias.detach().clone()
    expected = bias * own_params(layer)["s"].detach() if scale_bias else bias
    assert_close(as_matrix(layer)[1], expected)
    before = as_matrix(layer)
    layer.merge()
    assert_close(as_matrix(layer), before)
    assert_close(layer.get_base_layer().bias.detach(), expected)


def test_both_sides_hold_the_one_sided_forms() -> None:
    layer = perturb(make_layer("ssb", bias=False))
    params = {k: v.detach() for k, v in own_params(layer).items()}
    frozen = layer.frozen_weight().detach()
    params_l = {"l": params["l"], "s": torch.ones(8)}
    ssl = make_layer("ssl", weight=frozen, bias=False, params={"l": params["l"]})
    same = make_layer("ssb", weight=frozen, bias=False, params=params_l)
    assert_close(as_matrix(same), as_matrix(ssl))
    right = {"l": torch.ones(12), "s": params["s"]}
    ia3 = as_matrix(make_layer("ssb", weight=frozen, bias=False, params=right))[0]
    assert_close(ia3, params["s"][:, None] * frozen)


def test_a_factor_may_move_from_one_side_to_the_other() -> None:
    layer = perturb(make_layer("ssb"))
    before = as_matrix(layer)
    own_params(layer)["s"].data *= 4.0
    own_params(layer)["l"].data /= 4.0
    assert_close(as_matrix(layer), before)


def test_equals_ia3_of_peft_on_feedforward_modules() -> None:
    layer = perturb(make_layer("ssl"))
    net = nn.Sequential(nn.Linear(12, 8)).double()
    net[0].load_state_dict(layer.get_base_layer().state_dict())
    ia3 = get_peft_model(net, IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    twin = ia3.base_model.model[0].ia3_l["default"]
    twin.data = own_params(layer)["l"].detach().reshape(twin.shape)
    x = torch.randn(3, 12).double()
    assert_close(layer(x), ia3(x))


@pytest.mark.parametrize("kind", ["ssl", "ssb"])
def test_unmerge_restores_even_a_zero(kind: str) -> None:
    layer = perturb(make_layer(kind))
    own_params(layer)["l"].data[0] = 0.0
    frozen = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    assert (layer.get_base_layer().weight[:, 0] == 0).all()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, frozen)


@pytest.mark.parametrize(
    ("layers", "hidden", "wide", "ssl", "ssb"),
    [(12, 768, 3072, 27_648, 82_944), (24, 1024, 4096, 73_728, 221_184)],
)
def test_counts(layers: int, hidden: int, wide: int, ssl: int, ssb: int) -> None:
    shapes = [("attention", "k", hidden), ("attention", "v", hidden), ("ffn", "up", wide)]
    sites = [Site(r, "encoder", 0, layers, b, r, hidden, out) for b, r, out in shapes]
    for kind, total in (("ssl", ssl), ("ssb", ssb)):
        assert layers * sum(make_kind(kind).n_params(s, 1) for s in sites) == total


def test_wrong_option() -> None:
    with pytest.raises(ConfigError, match=r"ssb.scale_bias must be true or false; got 'no'"):
        make_kind("ssb", {"scale_bias": "no"})
