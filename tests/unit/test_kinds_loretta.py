"""Tensor trains and the two kinds made of them: worked numbers, published totals, invariants."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.kinds import Kind, make_kind, seeded
from prunepeft.kinds.tensor_train import (
    apply_train,
    core_shapes,
    draw_cores,
    factor_modes,
    full_matrix,
    train_of,
)
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site, Slot
from prunepeft.supernet import attach
from prunepeft.testing.host import PlainHost
from tests.tiny_models import TINY

SITE = Site("layer.0.q", "encoder", 0, 2, "attention", "q", 48, 36)
HOST = PlainHost(torch.zeros(36, 48))


def random_params(kind: Kind, site: Site, size: int) -> dict[str, Tensor]:
    draw = seeded(0, kind.name)
    return {k: torch.randn(s, generator=draw) for k, s in kind.shapes(site, size).items()}


def make_site(d_in: int, d_out: int) -> Site:
    return Site("p", "decoder", 0, 1, "ffn", "down", d_in, d_out)


# --- tensor trains -------------------------------------------------------------------------


def test_a_train_of_two_cores_by_hand() -> None:
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    last = torch.tensor([[[1.0], [0.0], [2.0]], [[0.0], [1.0], [1.0]]])
    expected = torch.tensor([[1.0, 2.0, 4.0], [3.0, 4.0, 10.0]])
    assert_close(full_matrix([first, last], 2), expected)
    assert_close(apply_train(torch.eye(2), [first, last]), expected)


@pytest.mark.parametrize(
    ("n", "modes"),
    [
        (1, (1,)),
        (13, (13,)),
        (16, (16,)),
        (17, (17,)),
        (34, (2, 17)),
        (289, (17, 17)),
        (768, (8, 8, 12)),
        (4096, (16, 16, 16)),
        (11008, (16, 16, 43)),
    ],
)
def test_modes_by_hand(n: int, modes: tuple[int, ...]) -> None:
    assert factor_modes(n) == modes


@given(st.integers(1, 70_000))
def test_modes_multiply_to_n_and_only_primes_are_large(n: int) -> None:
    modes = factor_modes(n)
    assert math.prod(modes) == n
    assert list(modes) == sorted(modes)
    large = [m for m in modes if m > 16]
    assert not [m for m in large if any(m % f == 0 for f in range(2, math.isqrt(m) + 1))]


@pytest.mark.parametrize(
    ("p", "q", "modes", "n"),
    [
        (768, 64, [8, 8, 12, 8, 8], 780),
        (64, 768, [8, 8, 12, 8, 8], 780),
        (768, 8, [8, 8, 12, 8], 580),
        (8, 768, [8, 12, 8, 8], 580),
    ],
)
def test_size_of_a_train_by_hand(p: int, q: int, modes: list[int], n: int) -> None:
    shapes = core_shapes("A", p, q, 5)
    assert [s[1] for s in shapes.values()] == modes
    assert sum(map(math.prod, shapes.values())) == n


@pytest.mark.parametrize(
    ("p", "q", "rank"), [(6, 1, 2), (1, 20, 3), (48, 8, 5), (8, 306, 1), (38, 400, 6), (51, 34, 4)]
)
def test_the_input_through_the_cores_is_the_input_times_the_matrix(
    p: int, q: int, rank: int
) -> None:
    shapes, draw = core_shapes("A", p, q, rank), seeded(0, "x")
    cores = [torch.randn(s, generator=draw).double() for s in shapes.values()]
    x = torch.randn(2, 3, p, generator=draw).double()
    assert_close(apply_train(x, cores), x @ full_matrix(cores, p), rtol=0, atol=1e-9)
    assert apply_train(x[:0], cores).shape == (0, 3, q)


@pytest.mark.parametrize(("p", "q"), [(768, 64), (8, 768), (64, 400)])
def test_first_values_give_the_matrix_its_variance(p: int, q: int) -> None:
    shapes = core_shapes("A", p, q, 5)
    squares = []
    for seed in range(50):
        cores = train_of(draw_cores(shapes, "A", q, seeded(seed, "A")), "A")
        squares.append(full_matrix(cores, p).square().mean().item())
    assert sum(squares) / 50 == pytest.approx(1 / (p + q), rel=0.15)


# --- the kinds are what they are made of -----------------------------------------------------


def test_rep_is_lora_with_the_matrices_of_its_trains() -> None:
    rep, lora = make_kind("loretta_rep", {"alpha": 4.0}), make_kind("lora")
    params = random_params(rep, SITE, 3)
    x = torch.randn(2, 5, 48, generator=seeded(0, "x"))
    a, b = (full_matrix(train_of(params, t), n) for t, n in (("A", 48), ("B", 8)))
    assert (rep.scaling(3), rep.scaling(64), make_kind("loretta_rep").scaling(3)) == (0.5, 0.5, 2.0)
    expected = lora.delta({"A": a.T, "B": b.T}, x, x, 0.5, HOST)
    found = rep.delta(params, x, x, 0.5, HOST)
    assert_close(found, expected, rtol=1e-5, atol=1e-3)
    weight, bias = torch.randn(36, 48, generator=seeded(0, "w")), torch.ones(36)
    merged, same = rep.merged(weight, bias, params, 0.5, "add")
    assert same is bias
    assert_close(x @ merged.T, x @ weight.T + found, rtol=1e-5, atol=1e-3)


def test_adp_is_a_serial_adapter_with_the_matrices_of_its_trains() -> None:
    adp = make_kind("loretta_adp", {"activation": "gelu", "scale": 2.0, "bottleneck": 20})
    serial = make_kind("serial_adapter", {"activation": "gelu", "scale": 2.0})
    params = random_params(adp, SITE, 3)
    y = 0.1 * torch.randn(2, 5, 36, generator=seeded(0, "y"))
    down, up = (full_matrix(train_of(params, t), n).T for t, n in (("down", 36), ("up", 20)))
    dense = {"down": down, "up": up, **{k: params[k] for k in ("down_bias", "up_bias")}}
    assert adp.stages(SITE) == ("output",)
    expected = serial.delta(dense, y, y, serial.scaling(20), HOST)
    assert_close(adp.delta(params, y, y, adp.scaling(3), HOST), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rank", "size", "expected"), [(8, 5, 5), (3, 5, 3), (8, 2, 2)])
def test_rank_of_the_update(rank: int, size: int, expected: int) -> None:
    kind = make_kind("loretta_rep", {"rank": rank})
    params = {k: v.double() for k, v in random_params(kind, SITE, size).items()}
    update, _ = kind.merged(torch.zeros(36, 48).double(), None, params, 2.0, "add")
    assert torch.linalg.matrix_rank(update) == expected


@pytest.mark.parametrize("name", ["loretta_adp", "loretta_rep"])
def test_autocast_leaves_the_trains_in_float32(name: str) -> None:
    kind, draw = make_kind(name), seeded(0, "x")
    params = random_params(kind, SITE, 3)
    x, y = (torch.randn(4, n, generator=draw) for n in (48, 36))
    expected = kind.delta(params, x, y, 2.0, HOST)
    with torch.autocast("cpu", torch.bfloat16):
        found = kind.delta(params, x, y, 2.0, HOST)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)


# --- first values and first steps ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "awake"), [("loretta_rep", {"B3"}), ("loretta_adp", {"up4", "up_bias"})]
)
def test_all_cores_learn_after_one_step_from_a_zero_start(name: str, awake: set[str]) -> None:
    kind, site, draw = make_kind(name), make_site(48, 768), seeded(0, "x")
    x, y = (torch.randn(4, n, generator=draw) for n in (48, 768))
    params = kind.init(kind.shapes(site, 5), HOST, draw)
    params = {k: v.requires_grad_() for k, v in params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    learning = []
    for _ in range(2):
        optimizer.zero_grad()
        delta = kind.delta(params, x, y, 2.0, HOST)
        (delta - 1).square().mean().backward()
        learning.append({k for k, p in params.items() if p.grad.any()})
        optimizer.step()
    assert learning == [awake, set(params)]


def test_first_biases_of_adp() -> None:
    site = make_site(8, 400)
    for start, bound in (("zero", 0.0), ("paper", 1 / 20)):
        kind = make_kind("loretta_adp", {"init_weights": start})
        values = kind.init(kind.shapes(site, 3), HOST, seeded(0, start))
        assert values["up_bias"].abs().max().item() == pytest.approx(bound, rel=0.02)
        assert values["down_bias"].abs().max().item() == pytest.approx(1 / 8, rel=0.1)
        assert bool(train_of(values, "up")[-1].any()) == (start == "paper")


def test_a_checkpoint_of_other_modes_is_refused(tmp_path: Path) -> None:
    model = TINY["bert"]()
    sites = [s for s in find_sites(model) if s.role == "q"]
    net = attach(copy.deepcopy(model), Placement({Slot((sites[0],), "loretta_rep", (3,)): 3}))
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["placement"]["slots"][0]["options"] = {"rank": 12}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of another shape"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loretta_rep", {"rank": 0}, "loretta_rep.rank must be a whole number in"),
        ("loretta_rep", {"rank": 2.5}, "got 2.5"),
        ("loretta_rep", {"alpha": 0.0}, "loretta_rep.alpha must be in"),
        ("loretta_rep", {"dropout": 1.0}, "loretta_rep.dropout must be in"),
        ("loretta_rep", {"init_weights": "offset"}, "one of zero, paper; got 'offset'"),
        ("loretta_adp", {"bottleneck": True}, "loretta_adp.bottleneck must be a whole number"),
        ("loretta_adp", {"scale": 0.0}, "loretta_adp.scale must be in"),
    ],
)
def test_wrong_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_kind(name, options)


# --- published totals: trains, dense biases, norms and head apart ------------------------------


def train_size(modes: tuple[int, ...], rank: int) -> int:
    """Closed form of a train with these modes, as the authors list them."""
    ranks = (1, *[rank] * (len(modes) - 1), 1)
    return sum(r * k * s for r, k, s in zip(ranks, modes, ranks[1:], strict=False))


def own_sizes(name: str, site: Site, size: int) -> tuple[int, int]:
    """Parameters of our module: in the trains, in dense biases."""
    shapes = make_kind(name).shapes(site, size)
    biases = sum(math.prod(s) for k, s in shapes.items() if k.endswith("_bias"))
    return sum(map(math.prod, shapes.values())) - biases, biases


def test_published_total_of_adp_on_deberta_base() -> None:
    trains, biases = own_sizes("loretta_adp", make_site(3072, 768), 5)
    assert (trains, biases) == (2 * 780, 64 + 768)
    norms, pooler, head = 25 * 2 * 768, train_size((8, 8, 12, 12, 8, 8), 5) + 768, 768 * 2 + 2
    assert (24 * (trains + biases), norms, pooler, head) == (57_408, 38_400, 1_848, 1_538)
    assert 24 * (trains + biases) + norms + pooler + head == 99_194  # published: 0.10 M


def test_published_total_of_rep_on_deberta_base() -> None:
    norms = 25 * 2 * 768
    a, b = train_size((8, 8, 12, 8), 5), train_size((16, 8, 9, 16), 5)
    assert (a, b) == (580, 585)
    assert 12 * (a + b) + norms == 52_380  # published: 0.05 M
    # Ours of the fused query, key and value: modes 8, 16, 12, 12 for 8 x 2304.
    assert own_sizes("loretta_rep", make_site(768, 2304), 5) == (580 + 800, 0)


def test_published_total_of_adp_on_llama_7b() -> None:
    trains, biases, norms = 2 * train_size((16, 16, 16, 4, 4, 4), 5), 64 + 4096, 65 * 4096
    assert (96 * trains, 96 * biases, norms) == (211_200, 399_360, 266_240)
    assert 96 * (trains + biases) + norms == 876_800  # published: 0.88 M
    # Ours: modes 16, 16, 16, 8, 8.
    assert own_sizes("loretta_adp", make_site(11008, 4096), 5) == (2 * 1_120, biases)
    assert 96 * (2 * 1_120 + biases) + norms == 880_640


def test_published_total_of_rep_on_llama_7b() -> None:
    trains, norms = 2 * train_size((16, 16, 8, 4, 4), 8), 65 * 4096
    assert (64 * trains, norms) == (249_856, 266_240)
    assert 64 * trains + norms == 516_096  # published: 0.51 M
    # Ours: modes 16, 16, 16, 8.
    assert own_sizes("loretta_rep", make_site(4096, 4096), 8) == (2 * 2_240, 0)
    assert 64 * 2 * 2_240 + norms == 552_960
