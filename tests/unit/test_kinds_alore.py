"""ALoRE against worked numbers and explicit Kronecker products."""

import pytest
import torch
from torch.testing import assert_close

from prunepeft.errors import SiteError
from prunepeft.kinds import make_kind
from prunepeft.kinds.alore import _times_e
from prunepeft.space import Site
from tests.one_layer import as_matrix, make_layer, own_params, perturb


def explicit(params: dict[str, torch.Tensor]) -> torch.Tensor:
    """E by its definition."""
    p = {k: v.detach() for k, v in params.items()}
    if "T" not in p:
        return sum(torch.kron(s, u @ v) for s, u, v in zip(p["S"], p["U"], p["V"], strict=True))
    down = sum(torch.kron(s, u) for s, u in zip(p["S"], p["U"], strict=True))
    up = sum(torch.kron(t, v) for t, v in zip(p["T"], p["V"], strict=True))
    return down @ up


def test_tiny_numbers() -> None:
    params = {
        "S": torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        "U": torch.tensor([[[2.0]], [[3.0]]]),
        "V": torch.tensor([[[1.0]], [[1.0]]]),
    }
    layer = make_layer("alore", weight=torch.eye(2), params=params, experts=2, bias=False)
    assert_close(as_matrix(layer)[0].T - torch.eye(2), torch.tensor([[2.0, 7], [9, 8]]).double())
    assert_close(layer(torch.ones(2).double()), torch.tensor([12.0, 16]).double())


@pytest.mark.parametrize("form", ["expert", "phm"])
@pytest.mark.parametrize(("experts", "size"), [(1, 3), (2, 4), (4, 2)])
def test_equals_the_explicit_product(form: str, experts: int, size: int) -> None:
    layer = perturb(make_layer("alore", 12, 8, experts=experts, size=size, form=form))
    e = explicit(own_params(layer))
    h = torch.randn(3, 5, 8).double()
    with torch.no_grad():
        assert_close(_times_e(h, own_params(layer)), h @ e)


@pytest.mark.parametrize("form", ["expert", "phm"])
@pytest.mark.parametrize("position", ["post", "pre", "parallel"])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_equals_forward(form: str, position: str, bias: bool) -> None:
    d_in = 8 if position == "parallel" else 12
    layer = make_layer("alore", d_in, 8, bias=bias, form=form, position=position, size=2, scale=0.5)
    perturb(layer)
    base = layer.get_base_layer()
    frozen = {k: v.clone() for k, v in base.state_dict().items()}
    weight, total_bias = as_matrix(layer)
    e = 0.5 * explicit(own_params(layer))
    w = frozen["weight"]
    change = {"post": lambda: e.T @ w, "pre": lambda: w @ e.T, "parallel": lambda: e.T}
    assert_close(weight, w + change[position]())
    layer.merge()
    assert_close(as_matrix(layer), (weight, total_bias))
    if bias:
        assert torch.equal(base.bias, frozen["bias"]) == (position != "post")
    layer.unmerge()
    assert all(torch.equal(v, frozen[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("form", ["expert", "phm"])
def test_first_step_reaches_the_last_factor_alone(form: str) -> None:
    layer = make_layer("alore", form=form, size=2)
    x = torch.randn(6, 12).double()
    assert_close(layer(x), layer.get_base_layer()(x), atol=0, rtol=0)
    layer(x).square().sum().backward()
    params = own_params(layer)
    assert {n for n, p in params.items() if p.grad.abs().max() > 0} == {"V"}
    torch.optim.SGD(params.values(), lr=0.1).step()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in params.values())


def test_rank_of_the_change() -> None:
    layer = perturb(make_layer("alore", 768, 768, experts=4, size=4, position="parallel"))
    with torch.no_grad():
        e = _times_e(torch.eye(768).double(), own_params(layer))
    assert torch.linalg.matrix_rank(e) == 64


def test_order_of_the_experts_does_not_matter() -> None:
    layer = perturb(make_layer("alore", size=2))
    before = as_matrix(layer)
    for parameter in own_params(layer).values():
        parameter.data = parameter.data.flip(0)
    assert_close(as_matrix(layer), before)


@pytest.mark.parametrize(
    ("options", "size", "sites", "total"),
    [
        ({"experts": 4}, 4, 24, 148_992),
        ({"experts": 4}, 8, 12, 148_224),
        ({"experts": 4, "form": "phm"}, 4, 24, 150_528),
        ({"experts": 4, "form": "phm"}, 8, 12, 148_992),
        ({"experts": 1}, 4, 1, 6_145),
        ({"experts": 8}, 4, 1, 6_656),
    ],
)
def test_counts(options: dict, size: int, sites: int, total: int) -> None:
    site = Site("l.0.o", "encoder", 0, 12, "attention", "o", 768, 768)
    assert sites * make_kind("alore", options).n_params(site, size) == total


def test_wrong_places() -> None:
    with pytest.raises(SiteError, match=r"alore.experts must divide .* got 3 for layer.0.x"):
        make_layer("alore", experts=3)
    with pytest.raises(
        SiteError, match=r"alore.position parallel needs .* 12 inputs and 8 outputs"
    ):
        make_layer("alore", position="parallel")
