"""The kinds against numbers worked by hand, their sizes, first values and options."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from prunepeft.errors import ConfigError, PrunePeftError, SiteError, UnknownNameError
from prunepeft.kinds import KINDS, make_kind, n_params, seeded
from prunepeft.kinds.dora import direction_norm
from prunepeft.space import Site, Slot
from prunepeft.testing.host import PlainHost

SITE = Site("layer.0.down", "encoder", 0, 2, "ffn", "down", 3, 2, source="layer.0.up")
NORM = Site("layer.0.norm", "encoder", 0, 2, "attention", "norm", 5, 5)
INNER = Site("layer.0.q", "encoder", 0, 2, "attention", "q", 3, 2)


# --- numbers worked by hand ----------------------------------------------------------------


def bottleneck_params() -> dict[str, Tensor]:
    """D = 2, R = 1."""
    return {
        "down": torch.tensor([[1.0, -1.0]]),
        "down_bias": torch.tensor([0.5]),
        "up": torch.tensor([[2.0], [-1.0]]),
        "up_bias": torch.tensor([0.1, 0.2]),
    }


HIDDEN = torch.tensor([[3.0, 1.0], [1.0, 3.0]])  # down gives 2.5 and -1.5
RELU = torch.tensor([[10.2, -4.6], [0.2, 0.4]])  # 2 (2.5 up + up_bias), 2 up_bias


def test_serial_adapter_by_hand() -> None:
    kind = make_kind("serial_adapter", {"scale": 2.0})
    x = torch.full((2, 3), torch.nan)  # must not be read
    found = kind.delta(bottleneck_params(), x, HIDDEN, kind.scaling(1), PlainHost(torch.ones(2, 3)))
    assert kind.stages(SITE) == ("output",)
    assert_close(found, RELU)


def test_parallel_adapter_by_hand() -> None:
    kind = make_kind("parallel_adapter", {"scale": 2.0})
    x, y = torch.full((2, 3), torch.nan), torch.full((2, 2), torch.nan)  # must not be read
    host = PlainHost(torch.ones(2, 3), HIDDEN)
    assert kind.stages(SITE) == ("add",)
    assert_close(kind.delta(bottleneck_params(), x, y, kind.scaling(1), host), RELU)


@pytest.mark.parametrize(
    ("activation", "value"),
    [
        ("relu", 2.5),
        ("gelu", 2.5 * 0.5 * (1 + math.erf(2.5 / math.sqrt(2)))),
        ("silu", 2.5 / (1 + math.exp(-2.5))),
        ("tanh", math.tanh(2.5)),
    ],
)
def test_activations_by_hand(activation: str, value: float) -> None:
    kind = make_kind("serial_adapter", {"activation": activation})
    y = HIDDEN[:1]
    found = kind.delta(bottleneck_params(), y, y, 1.0, PlainHost(torch.ones(2, 3)))
    assert_close(found, torch.tensor([[2 * value + 0.1, -value + 0.2]]))


def test_ia3_by_hand() -> None:
    kind = make_kind("ia3")
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0])
    params = {"l": torch.tensor([2.0, 0.5])}
    y = torch.tensor([3.0, 1.0])
    assert (kind.stages(SITE), kind.stages(INNER)) == (("input",), ("scale",))
    assert_close(kind.delta(params, y, y, 1.0, PlainHost(weight)), torch.tensor([3.0, -0.5]))
    after = kind.merged(weight, bias, params, 1.0, "scale")
    assert_close(after, (torch.tensor([[2.0, 4.0], [1.5, 2.0]]), torch.tensor([2.0, 0.5])))
    before = kind.merged(weight, bias, params, 1.0, "input")
    assert_close(before, (torch.tensor([[2.0, 1.0], [6.0, 2.0]]), bias))
    assert kind.merged(weight, None, params, 1.0, "scale")[1] is None


def test_dora_by_hand() -> None:
    kind = make_kind("dora")
    host = PlainHost(torch.tensor([[3.0, 4.0]]))
    params = {
        "A": torch.tensor([[1.0, 0.0]]),
        "B": torch.zeros(1, 1),
        "magnitude": torch.tensor([10.0]),
    }
    x = torch.tensor([[1.0, 1.0]])
    # ||W|| = 5, so c = 2: the layer gives 7, the module adds 7.
    assert_close(kind.delta(params, x, x, 2.0, host), torch.tensor([[7.0]]))
    # W + 2 B A = (6, 8) with B = 1.5 and A = (1, 4/3): norm 10, c = 1, the module adds 3 + 4.
    params |= {"A": torch.tensor([[1.0, 4 / 3]]), "B": torch.tensor([[1.5]])}
    assert_close(kind.delta(params, x, x, 2.0, host), torch.tensor([[7.0]]))
    merged, bias = kind.merged(host.weight, None, params, 2.0, "add")
    assert_close(merged, torch.tensor([[6.0, 8.0]]))
    assert bias is None


def test_dora_norm_is_that_of_the_whole_matrix() -> None:
    draw = seeded(0, "norm")
    w, a, b = (torch.randn(s, generator=draw) for s in ((64, 48), (8, 48), (64, 8)))
    w[0] = 0.0
    found = direction_norm(PlainHost(w), {"A": a, "B": b}, 2.0)
    assert_close(found, torch.linalg.norm(w + 2.0 * b @ a, dim=1), rtol=1e-5, atol=0)
    unchanged = direction_norm(PlainHost(w), {"A": a, "B": torch.zeros_like(b)}, 2.0)
    assert torch.equal(unchanged[1:], torch.linalg.norm(w, dim=1)[1:])
    assert unchanged[0] > 0  # a row of zeros does not divide by zero


def test_dora_gradient_takes_the_norm_as_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, draw = make_kind("dora"), seeded(0, "dora")
    sizes = {"A": (2, 3), "B": (2, 2), "magnitude": (2,), "x": (4, 3), "W": (2, 3)}
    t = {
        k: torch.randn(v, generator=draw).double().requires_grad_(k != "W")
        for k, v in sizes.items()
    }
    norm = direction_norm(PlainHost(t["W"]), t, 2.0).detach()
    monkeypatch.setattr("prunepeft.kinds.dora.direction_norm", lambda *_: norm)
    names = [k for k in sizes if k != "W"]

    def delta(*values: Tensor) -> Tensor:
        now = dict(zip(names, values, strict=True))
        return kind.delta(now, now["x"], now["x"], 2.0, PlainHost(t["W"]))

    assert torch.autograd.gradcheck(delta, [t[k] for k in names])


def test_dora_stays_finite_on_a_zero_row() -> None:
    kind, host = make_kind("dora"), PlainHost(torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]))
    params = kind.init(kind.shapes(SITE, 2), host, seeded(0))
    assert params["magnitude"].tolist() == [0.0, 5.0]
    params = {k: v.requires_grad_() for k, v in params.items()}
    delta = kind.delta(params, torch.ones(1, 3), torch.ones(1, 2), 1.0, host)
    delta.sum().backward()
    assert delta.tolist() == [[0.0, 0.0]]
    assert all(p.grad.isfinite().all() for p in params.values())


# --- sizes and first values ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "site", "expected"),
    [
        ("lora", SITE, 4 * (3 + 2)),
        ("dora", SITE, 4 * (3 + 2) + 2),
        ("ia3", SITE, 3),
        ("ia3", INNER, 2),
        ("serial_adapter", SITE, 2 * 4 * 2 + 4 + 2),
        ("parallel_adapter", SITE, 2 * 4 * 2 + 4 + 2),
        ("bitfit", SITE, 2),
        ("lnfit", NORM, 5),
        ("lnfit", replace(NORM, has_bias=True), 10),
    ],
)
def test_parameter_count_by_hand(kind: str, site: Site, expected: int) -> None:
    size = 4 if KINDS.get(kind).sized else 1
    assert n_params(Slot((site,), kind, (size,)), size) == expected


@given(data=st.data(), size=st.integers(1, 8), kind=st.sampled_from(KINDS.names()))
def test_cut_tensors_have_the_shapes_of_the_smaller_size(
    data: st.DataObject, size: int, kind: str
) -> None:
    made = make_kind(kind)
    if not made.shrink_axes:
        with pytest.raises(ConfigError, match="no ranks to cut"):
            made.shrunk({}, torch.tensor([0]))
        return
    keep = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    site = Site("p", "encoder", 0, 2, "ffn", "down", 12, 8, source="q")
    values = made.init(made.shapes(site, size), PlainHost(torch.ones(8, 12)), seeded(0))
    cut = made.shrunk(values, torch.tensor(keep))
    assert {k: tuple(v.shape) for k, v in cut.items()} == made.shapes(site, len(keep))


@pytest.mark.parametrize("init_weights", ["zero", "paper"])
def test_first_values_of_a_bottleneck(init_weights: str) -> None:
    kind = make_kind("serial_adapter", {"init_weights": init_weights})
    wide = Site("p", "encoder", 0, 1, "ffn", "down", 8, 400)
    values = kind.init(kind.shapes(wide, 100), PlainHost(torch.ones(1, 1)), seeded(0))
    assert values["down"].std().item() == pytest.approx(1 / 20, rel=0.02)
    assert values["up"].std().item() == pytest.approx(0.1 * (init_weights == "paper"), rel=0.02)
    assert not values["down_bias"].any()
    assert not values["up_bias"].any()


@pytest.mark.parametrize("kind", ["lora", "dora", "serial_adapter", "parallel_adapter"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    draw = seeded(0, kind)
    plain, dropping = make_kind(kind), make_kind(kind, {"dropout": 0.5})
    weight, x, y = (torch.randn(s, generator=draw) for s in ((2, 3), (5, 3), (5, 2)))
    params = {k: torch.randn(s, generator=draw) for k, s in plain.shapes(SITE, 4).items()}

    def delta(made: object, training: bool) -> Tensor:
        return made.delta(params, x, y, 1.0, PlainHost(weight, y, training=training))

    assert_close(delta(dropping, False), delta(plain, True), rtol=0, atol=0)
    assert not torch.allclose(delta(dropping, True), delta(plain, True))


# --- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("lora", {"alpha": 0}, ConfigError, r"lora.alpha must be in \[1e-06, 1e\+06\]; got 0"),
        ("dora", {"alpha": -1.0}, ConfigError, "dora.alpha must be in"),
        ("dora", {"dropout": 1.0}, ConfigError, "dora.dropout must be in"),
        ("dora", {"rslora": 1}, ConfigError, "dora.rslora must be true or false; got 1"),
        ("dora", {"alpah": 1}, UnknownNameError, "did you mean 'alpha'"),
        ("ia3", {"alpha": 1.0}, UnknownNameError, "option of kind 'ia3'"),
        ("serial_adapter", {"dropout": math.nan}, ConfigError, "serial_adapter.dropout must be in"),
        ("serial_adapter", {"scale": True}, ConfigError, "serial_adapter.scale must be in"),
        ("serial_adapter", {"activation": "gelo"}, UnknownNameError, "did you mean 'gelu'"),
        ("parallel_adapter", {"activation": 3}, UnknownNameError, "parallel_adapter.activation 3"),
        (
            "parallel_adapter",
            {"init_weights": "bert"},
            ConfigError,
            "one of zero, paper; got 'bert'",
        ),
        ("serial_adaptor", {}, UnknownNameError, "did you mean 'serial_adapter'"),
    ],
)
def test_wrong_options(kind: str, options: dict, error: type[PrunePeftError], message: str) -> None:
    with pytest.raises(error, match=message):
        make_kind(kind, options)


def test_parallel_adapter_needs_a_source() -> None:
    with pytest.raises(SiteError, match=r"layer\.0\.q has role 'q'"):
        make_kind("parallel_adapter").stages(INNER)


@pytest.mark.parametrize("kind", ["serial_adapter", "parallel_adapter"])
def test_bottlenecks_cannot_be_merged(kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be merged"):
        make_kind(kind).merged(torch.ones(2, 3), None, bottleneck_params(), 1.0, "output")
