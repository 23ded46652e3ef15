"""The recorder against a naive reference that stores every gradient and output."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prunepeft.criteria import PAPER_CRITERIA, score_units
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError, StateError
from tests.watched_toy import Toy


@dataclass
class Naive:
    """Everything that happened: per step, unit and tensor."""

    grads: list[dict[str, list[Tensor]]]
    weights: list[dict[str, list[Tensor]]]
    outputs: list[dict[str, list[Tensor]]]


def batches(n: int, seed: int = 1) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(6, 3, generator=draw) for _ in range(n))


def train(toy: Toy, recorder: Recorder, steps: int, accumulation: int = 1) -> Naive:
    naive = Naive([], [], [])
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, _, y: seen.setdefault(m.slot_id, []).append(y.detach().clone())
        )
        for layer in toy.layers
    ]
    data = batches(steps * accumulation)
    for _ in range(steps):
        seen.clear()
        for _ in range(accumulation):
            toy(next(data)).square().mean().backward()
        recorder.step()
        naive.grads.append({u: [p.grad.clone() for p in ps] for u, ps in toy.units.items()})
        naive.weights.append({u: [p.detach().clone() for p in ps] for u, ps in toy.units.items()})
        naive.outputs.append(dict(seen))
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return naive


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sums_equal_a_naive_reference(accumulation: int) -> None:
    toy = Toy()
    recorder = Recorder(toy.units, toy.layers, output_every=2)
    start = {unit: flat([p.detach() for p in ps]) for unit, ps in toy.units.items()}
    with recorder:
        naive = train(toy, recorder, 5, accumulation)
    record = recorder.read()
    assert (record.units, record.steps) == (("tied", "single"), 5)
    for i, unit in enumerate(record.units):
        steps = [flat(g[unit]) for g in naive.grads]
        products = [flat(w[unit]) * g for w, g in zip(naive.weights, steps, strict=True)]
        sampled = [naive.outputs[s] for s in (0, 1, 3)]
        outputs = flat([y for step in sampled for y in step[unit]])
        assert_close(flat(list(record.grad_sum[i])), sum(steps))
        assert_close(record.abs_grad_mean[i], torch.stack(steps).abs().mean())
        assert_close(record.abs_weight_grad_mean[i], torch.stack(products).abs().mean())
        assert_close(record.output_abs_mean[i], outputs.abs().mean())
        assert_close(record.init_rms[i], start[unit].square().mean().sqrt())
        assert_close(list(record.weights[i]), [p.detach() for p in toy.units[unit]])


def test_record_is_a_copy() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder:
        train(toy, recorder, 2)
        record = recorder.read()
        before = [t.clone() for t in (*record.weights[0], *record.grad_sum[0])]
        train(toy, recorder, 2)
    assert_close([*record.weights[0], *record.grad_sum[0]], before, rtol=0, atol=0)
    assert recorder.read().steps == 4


def test_tied_sites_are_one_unit() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder:
        train(toy, recorder, 1)
    record = recorder.read()
    assert [len(unit) for unit in record.weights] == [4, 2]
    assert [tuple(g.shape) for g in record.grad_sum[0]] == [(4, 3), (4,), (5, 4), (5,)]


def test_recorded_pass_feeds_every_paper_criterion() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder:
        train(toy, recorder, 3)
    scores = score_units(recorder.read(), PAPER_CRITERIA)
    assert all(set(values) == {"tied", "single"} for values in scores.values())
    assert all(scores["gradient"][unit] > 0 for unit in toy.units)


@pytest.mark.parametrize("need", ["weights", "gradients", "outputs"])
def test_collects_only_what_is_needed(need: str) -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers, needs={need}) as recorder:
        assert (toy.first.observer is not None) == (need == "outputs")
        train(toy, recorder, 1)
    record = recorder.read()
    assert record.holds == {need}
    filled = {
        name
        for name in vars(record)
        if name not in ("units", "steps") and len(getattr(record, name))
    }
    assert (
        filled
        == {
            "weights": {"weights", "init_rms"},
            "gradients": {"grad_sum", "abs_grad_mean", "abs_weight_grad_mean"},
            "outputs": {"output_abs_mean"},
        }[need]
    )


def test_missing_gradient_counts_as_zero() -> None:
    toy = Toy()
    with Recorder(toy.units, needs={"gradients"}) as recorder:
        toy.third(torch.ones(1, 5)).sum().backward()
        recorder.step()
        toy.zero_grad(set_to_none=True)
        recorder.step()
    record = recorder.read()
    assert record.abs_grad_mean.tolist() == [0.0, 0.5]
    assert all(not g.any() for g in record.grad_sum[0])
    assert all(bool((g == 1).all()) for g in record.grad_sum[1])


def test_observers_are_removed_after_an_error() -> None:
    toy = Toy()

    def fail() -> None:
        with Recorder(toy.units, toy.layers):
            assert all(layer.observer is not None for layer in toy.layers)
            raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        fail()
    assert all(layer.observer is None for layer in toy.layers)


def test_recorder_starts_afresh_when_entered_again() -> None:
    toy = Toy()
    recorder = Recorder(toy.units, toy.layers)
    for _ in range(2):
        with recorder:
            naive = train(toy, recorder, 2)
    record = recorder.read()
    assert record.steps == 2
    assert_close(flat(list(record.grad_sum[1])), sum(flat(g["single"]) for g in naive.grads))


def test_two_recorders_on_one_layer_are_refused() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers):
        with pytest.raises(StateError, match="recorded already"), Recorder(toy.units, toy.layers):
            pass
        assert all(layer.observer is not None for layer in toy.layers)


def test_two_recorders_are_refused_in_a_step_that_is_not_looked_at_too() -> None:
    toy = Toy()
    recorder = Recorder(toy.units, toy.layers, output_every=100)
    with recorder:
        train(toy, recorder, 2)
        assert all(layer.observer is None for layer in toy.layers)
        with pytest.raises(StateError, match="recorded already"), Recorder(toy.units, toy.layers):
            pass
        train(toy, recorder, 1)
    assert recorder.read().steps == 3
    with Recorder(toy.units, toy.layers):
        pass


def test_no_step_is_refused() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder:
        toy(torch.ones(1, 3))
    with pytest.raises(StateError, match="holds 0 optimiser steps, at least 1 is needed"):
        recorder.read()


def test_no_output_is_refused() -> None:
    toy = Toy().eval()
    with Recorder(toy.units, toy.layers, needs={"outputs"}) as recorder:
        train(toy, recorder, 1)
    with pytest.raises(StateError, match="training mode"):
        recorder.read()


def test_step_outside_is_refused() -> None:
    recorder = Recorder(Toy().units)
    with pytest.raises(StateError, match="outside the recorder"):
        recorder.step()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="cannot record hessians; allowed: gradients, outputs, suppression, weights",
    ):
        Recorder({}, needs={"hessians"})
    with pytest.raises(ConfigError, match="output_every must be 1 or more; got 0"):
        Recorder({}, output_every=0)


def test_reset_forgets_a_failed_pass() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder:
        rms = recorder._init_rms.clone()
        train(toy, recorder, 3)
        recorder.reset()
        naive = train(toy, recorder, 2)
    record = recorder.read()
    assert record.steps == 2
    assert_close(flat(list(record.grad_sum[0])), sum(flat(g["tied"]) for g in naive.grads))
    outputs = flat([y for step in naive.outputs for y in step["single"]])
    assert_close(record.output_abs_mean[1], outputs.abs().mean())
    assert_close(record.init_rms, rms, rtol=0, atol=0)
