"""The recorder under checkpointing, evaluation, bfloat16, several processes, and on a supernet."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.criteria.record import Recorder
from prunepeft.kinds import KINDS
from prunepeft.sites import find_sites
from prunepeft.supernet import (
    attach,
    gate_slots,
    neutral_values,
    placement_of,
    slot_layers,
    slot_parameters,
)
from tests.tiny_models import make_tiny, tiny_inputs
from tests.watched_toy import Toy

# Kinds that always change something: directions have no length, and every token gets attention.
UNDEFINED = ("ether", "ether_plus", "prefix")


@pytest.mark.parametrize("mode", ["reentrant", "saved"])
def test_recompute_is_not_counted(mode: str) -> None:
    toy = Toy()
    x = torch.randn(6, 3)
    plain, repeated = (Recorder(toy.units, toy.layers, needs={"outputs"}) for _ in range(2))
    for recorder, repeat in ((plain, ""), (repeated, mode)):
        with recorder:
            toy(x, repeat=repeat).sum().backward()
            recorder.step()
    assert_close(repeated.read().output_abs_mean, plain.read().output_abs_mean, rtol=0, atol=0)
    assert repeated._outputs.counts == plain._outputs.counts


def test_evaluation_is_not_counted() -> None:
    toy = Toy()
    with Recorder(toy.units, toy.layers, needs={"outputs"}) as recorder:
        toy(torch.ones(2, 3)).sum().backward()
        toy.eval()
        toy(torch.full((2, 3), 100.0))
        toy.train()
        recorder.step()
    assert recorder._outputs.counts == [2 * 4 + 2 * 5, 2 * 2]


def test_other_slots_on_a_layer_are_ignored() -> None:
    toy = Toy()
    only = {"single": toy.units["single"]}
    with Recorder(only, toy.layers, needs={"outputs"}) as recorder:
        toy(torch.ones(1, 3))
        recorder.step()
    assert recorder.read().output_abs_mean.shape == (1,)


def test_bfloat16_is_summed_in_float32() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    with Recorder({"a": [weight]}, needs={"weights", "gradients"}) as recorder:
        for _ in range(300):  # bfloat16 counts by ones to 256 only
            weight.grad = torch.ones(4, dtype=torch.bfloat16)
            recorder.step()
    record = recorder.read()
    assert record.grad_sum[0][0].tolist() == [300.0] * 4
    assert record.abs_grad_mean.tolist() == [1.0]
    assert record.weights[0][0].dtype == torch.float32


def record_of_rank(rank: int) -> Recorder:
    """One step on data of this rank; gradients by hand, since autograd and fork do not mix."""
    toy = Toy()
    with Recorder(toy.units, toy.layers) as recorder, torch.no_grad():
        toy(torch.full((1 + rank, 3), float(rank + 1)))
        for parameter in toy.parameters():
            parameter.grad = parameter * (rank - 0.3)
        recorder.step()
    return recorder


def work(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    record = record_of_rank(rank).read()
    torch.save(
        (record.grad_sum, record.abs_grad_mean, record.output_abs_mean), f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_two_processes_average_gradients_and_pool_outputs(tmp_path: Path) -> None:
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_close(first, second, rtol=0, atol=0)
    grad_sum, abs_grad_mean, output_abs_mean = first
    recorders = [record_of_rank(rank) for rank in range(2)]
    one, two = (recorder.read() for recorder in recorders)
    for got, g, h in zip(grad_sum[0], one.grad_sum[0], two.grad_sum[0], strict=True):
        assert_close(got, (g + h) / 2)
    assert_close(abs_grad_mean, (one.abs_grad_mean + two.abs_grad_mean) / 2)
    counts = [torch.tensor(recorder._outputs.counts) for recorder in recorders]
    pooled = (one.output_abs_mean * counts[0] + two.output_abs_mean * counts[1]) / sum(counts)
    assert_close(output_abs_mean, pooled)


def test_recorder_of_a_supernet() -> None:
    model = make_tiny("bert")
    net = attach(
        model, make_space(find_sites(model), sizes={"lora": 2, "serial_adapter": 2}).full()
    )
    net.train()
    ids = placement_of(net).ids
    # Leave one module out of the forward pass's result: its gradients must be zero.
    gate_slots(net, {ids[0]: 0.0})
    with Recorder.for_net(net, output_every=1) as recorder:
        net(**tiny_inputs("bert", net)).logits.square().sum().backward()
        recorder.step()
    record = recorder.read()
    assert record.units == ids
    assert [len(unit) for unit in record.weights] == [len(p) for p in slot_parameters(net).values()]
    assert [i for i, mean in enumerate(record.abs_grad_mean) if mean == 0] == [0]
    assert all(layer.observer is None for pairs in slot_layers(net).values() for layer, _ in pairs)


def test_weights_are_counted_from_where_they_change_nothing() -> None:
    kinds = ("ia3", "lnfit", "ssl", "ssb", "dora")
    model = make_tiny("bert")
    net = attach(model, make_space(find_sites(model), list(kinds), sizes={"dora": 2}).full())
    net.train()
    with Recorder.for_net(net, {"weights", "gradients"}) as recorder:
        net(**tiny_inputs("bert", net)).logits.square().sum().backward()
        recorder.step()
    record = recorder.read()
    for unit, weights in zip(record.units, record.weights, strict=True):
        is_zero = not any(w.any() for w in weights)
        assert is_zero == (not unit.endswith("dora"))  # whose A is not
    assert not record.abs_weight_grad_mean.any()
    assert record.abs_grad_mean.any()


@pytest.mark.parametrize("kind", [k for k in KINDS.names() if k not in UNDEFINED])
def test_tensors_at_their_neutral_values_change_nothing(kind: str) -> None:
    model = make_tiny("bert").eval()
    batch = tiny_inputs("bert", model)
    before = model(**batch).logits
    net = attach(model, make_space(find_sites(model), [kind]).full()).eval()
    neutral = neutral_values(net)
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            p.data = torch.zeros_like(p) + neutral[slot_id][path]
    assert_close(net(**batch).logits, before)
