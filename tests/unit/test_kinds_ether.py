"""ETHER and ETHER+ against worked numbers and the properties of reflections."""

import math

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from prunepeft.errors import ConfigError, SiteError, UnknownNameError
from prunepeft.kinds import make_kind
from prunepeft.space import Site
from tests.one_layer import as_matrix, make_layer, own_params, perturb


def transform(layer) -> torch.Tensor:
    """H of an input-sided module on the layer: W H = as_matrix, so put W = I."""
    return as_matrix(layer)[0]


def eye(width: int) -> torch.Tensor:
    return torch.eye(width).double()


def test_tiny_reflection() -> None:
    layer = make_layer("ether", weight=eye(2), params={"u": torch.tensor([[3.0, 4.0]])})
    assert_close(transform(layer), torch.tensor([[0.28, -0.96], [-0.96, -0.28]]).double())


def test_tiny_relaxed_reflection() -> None:
    params = {"input_u": torch.tensor([[1.0, 0.0]]), "input_v": torch.tensor([[0.6, 0.8]])}
    layer = make_layer("ether_plus", weight=eye(2), params=params, sides="input")
    assert_close(transform(layer), torch.tensor([[0.36, 0.48], [0.48, 1.64]]).double())


@pytest.mark.parametrize("blocks", [1, 4, 8])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_reflection_is_orthogonal(blocks: int, side: str) -> None:
    h = transform(perturb(make_layer("ether", weight=eye(16), blocks=blocks, side=side)))
    assert_close(h @ h.T, eye(16), atol=1e-12, rtol=0)
    assert_close(torch.linalg.det(h), torch.tensor((-1.0) ** blocks).double())
    assert_close(torch.linalg.norm(h - eye(16)), torch.tensor(2 * math.sqrt(blocks)).double())
    outside = torch.block_diag(*[torch.ones(16 // blocks, 16 // blocks)] * blocks) == 0
    assert (h[outside] == 0).all()  # diagonal blocks: block j never reaches block i


def test_singular_values_of_the_weight_stay() -> None:
    layer = perturb(make_layer("ether", blocks=4))
    frozen = torch.linalg.svdvals(layer.get_base_layer().weight)
    assert_close(torch.linalg.svdvals(as_matrix(layer)[0]), frozen)


@pytest.mark.parametrize("blocks", [1, 2])
def test_distance_of_the_relaxed_form_is_bounded(blocks: int) -> None:
    layer = perturb(make_layer("ether_plus", weight=eye(8), sides="input", blocks=blocks))
    u, v = (nn.functional.normalize(p, dim=-1) for p in own_params(layer).values())
    expected = (2 * (1 - (u * v).sum(-1).square())).sum().sqrt()
    assert_close(torch.linalg.norm(transform(layer) - eye(8)), expected.detach())


def test_first_values() -> None:
    assert_close(as_matrix(make_layer("ether_plus"))[0], make_layer("ether_plus").frozen_weight())
    moved = []
    for seed in range(40):
        layer = make_layer("ether", weight=eye(256), seed=seed)
        x = torch.randn(256, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            change = layer(x) - layer.get_base_layer()(x)
        moved.append(float(change.square().sum() / x.square().sum()))
    assert sum(moved) / len(moved) == pytest.approx(4 / 256, rel=0.5)  # 2 sqrt(n / d), squared


@pytest.mark.parametrize("factor", [10.0, -1.0])
def test_length_and_sign_of_a_direction_do_not_matter(factor: float) -> None:
    layer = perturb(make_layer("ether_plus", blocks=2))
    before = as_matrix(layer)[0]
    for parameter in own_params(layer).values():
        parameter.data[0] *= factor
    assert_close(as_matrix(layer)[0], before)


def test_gradient_is_orthogonal_to_the_direction() -> None:
    layer = perturb(make_layer("ether", blocks=4))
    layer(torch.randn(5, 12).double()).square().sum().backward()
    (u,) = own_params(layer).values()
    assert (u.grad * u).sum(-1).abs().max() < 1e-10
    assert u.grad.abs().max() > 0


def test_bias_is_not_transformed() -> None:
    layer = perturb(make_layer("ether_plus"))
    assert_close(as_matrix(layer)[1], layer.get_base_layer().bias.detach())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ether", {"blocks": 4}),
        ("ether", {"blocks": 2, "side": "output"}),
        ("ether_plus", {"blocks": 4}),
        ("ether_plus", {"sides": "output"}),
    ],
)
def test_merge_equals_forward_and_unmerge_restores(kind: str, options: dict) -> None:
    layer = perturb(make_layer(kind, **options))
    frozen = layer.get_base_layer().weight.detach().clone()
    expected = as_matrix(layer)
    layer.merge()
    assert_close(as_matrix(layer), expected)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, frozen)


def test_unmerge_of_a_singular_transform_is_exact() -> None:
    u, v = eye(12)[:1], eye(12)[1:2]
    layer = make_layer("ether_plus", params={"input_u": u, "input_v": v}, sides="input")
    frozen = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    assert torch.linalg.matrix_rank(layer.get_base_layer().weight[:, :2]) == 1
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, frozen)


def test_equals_hra_of_rank_one() -> None:
    layer = perturb(make_layer("ether"))
    net = nn.Sequential(nn.Linear(12, 8)).double()
    net[0].load_state_dict(layer.get_base_layer().state_dict())
    hra = get_peft_model(net, HRAConfig(r=1, apply_GS=False, target_modules=["0"]))
    twin = hra.base_model.model[0].hra_u["default"]
    twin.data = own_params(layer)["u"].detach().reshape(twin.shape)
    x = torch.randn(3, 12).double()
    assert_close(layer(x), hra(x).to(torch.float64), atol=1e-6, rtol=0)


def test_relaxed_form_trains_from_its_start() -> None:
    torch.manual_seed(0)
    layer = make_layer("ether_plus", 8, 8)
    x = torch.randn(64, 8).double()
    target = layer.get_base_layer()(x) + 0.3 * torch.randn(64, 8).double()
    optimizer = torch.optim.Adam(own_params(layer).values(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_counts() -> None:
    llama = Site("l.0.q", "decoder", 0, 32, "attention", "q", 4096, 4096)
    assert 64 * make_kind("ether", {"blocks": 32}).n_params(llama, 1) == 262_144
    assert 64 * make_kind("ether_plus").n_params(llama, 1) == 1_048_576
    widths = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    sites = [Site(f"e.{i}", "encoder", 0, 12, "ffn", "up", *w) for i, w in enumerate(widths)]
    for kind, total in (("ether", 82_944), ("ether_plus", 331_776)):
        assert 12 * sum(make_kind(kind).n_params(s, 1) for s in sites) == total


def test_wrong_options() -> None:
    with pytest.raises(
        SiteError, match=r"ether.blocks must divide .* got 5 for layer.0.x of width 12"
    ):
        make_layer("ether", blocks=5)
    with pytest.raises(
        ConfigError, match=r"ether.blocks must be a whole number in 1..65536; got 1.5"
    ):
        make_kind("ether", {"blocks": 1.5})
    with pytest.raises(UnknownNameError, match="'inptu'; did you mean 'input'"):
        make_kind("ether", {"side": "inptu"})
