"""One phase of training: its batches, its optimiser, and that cutting a batch changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from prunepeft.batches import batch_indices, derive_seed, judged_batches, n_steps
from prunepeft.candidates import make_space
from prunepeft.config import TrainSettings
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError, OutOfMemoryError, StateError
from prunepeft.progress import SilentProgress
from prunepeft.sites import find_sites
from prunepeft.supernet import attach, slot_parameters, trainable_state
from prunepeft.tasks import Collator
from prunepeft.training import PhaseLog, Phases, make_optimizer, make_scheduler
from prunepeft.training.phase_trainer import PhaseTrainer
from tests.tiny_models import TINY, VOCAB

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=150)
HUGE = 1e9  # a norm that clips nothing


# --- batches -----------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_batches_use_a_row_at_most_once(lengths, batch, pieces, seed):
    found = batch_indices(lengths, batch, pieces, seed)
    used = [i for piece in found for i in piece]
    size = min(batch, len(lengths))
    assert len(set(used)) == len(used) == n_steps(len(lengths), batch) * size
    assert set(used) <= set(range(len(lengths)))
    assert all(found)
    assert found == batch_indices(lengths, batch, pieces, seed)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_pieces_make_up_the_uncut_batches(lengths, batch, pieces, seed):
    whole = batch_indices(lengths, batch, 1, seed)
    size = min(batch, len(lengths))
    assert [len(step) for step in whole] == [size] * n_steps(len(lengths), batch)
    cut = batch_indices(lengths, batch, pieces, seed)
    per_step = min(pieces, size)
    assert len(cut) == per_step * len(whole)
    steps = [cut[i : i + per_step] for i in range(0, len(cut), per_step)]
    joined = [[i for piece in step for i in piece] for step in steps]
    assert joined == whole
    sizes = [len(piece) for piece in cut]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_change_the_order_and_rows_of_like_length_go_together():
    lengths = [1 + i % 40 for i in range(400)]
    assert batch_indices(lengths, 8, 1, 0) != batch_indices(lengths, 8, 1, 1)
    taken = [[lengths[i] for i in batch] for batch in batch_indices(lengths, 8, 1, 0)]
    assert max(max(batch) - min(batch) for batch in taken) <= 2


@given(LENGTHS, st.integers(1, 40))
def test_an_evaluation_reads_every_row_once_and_hardly_any_padding(lengths, most):
    found = judged_batches(lengths, most)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        tokens = len(batch) * max(lengths[i] for i in batch)
        assert 0 < len(batch) <= most
        assert tokens - sum(lengths[i] for i in batch) <= max(0.05 * tokens, 64)
    widths = [max(lengths[i] for i in batch) for batch in found]
    assert widths == sorted(widths)


@given(LENGTHS, st.integers(1, 40), st.integers(2, 4))
def test_processes_share_an_evaluation_in_batches_of_one_size(lengths, most, processes):
    found = judged_batches(lengths, most, processes)
    assert [i for batch in found for i in batch] == list(range(len(lengths)))
    assert {len(batch) for batch in found[:-1]} <= {most}
    assert 0 < len(found[-1]) <= most


def test_an_evaluation_is_cut_at_its_size_or_where_padding_would_be_too_much():
    assert [len(batch) for batch in judged_batches([7] * 150, 64)] == [64, 64, 22]
    assert judged_batches([100, 36, 101, 37], 64) == [[1, 3], [0, 2]]
    assert judged_batches([100, 36], 64) == [[1, 0]]  # not worth a pass of its own


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(seed, name, i) for seed in (0, 1) for name in "ab" for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "warmup", 1) == derive_seed(0, "warmup", 1) == 1615652410


# --- a phase -----------------------------------------------------------------------------------


def make_rows(name: str = "bert", n: int = 24, length: int | None = 7) -> Dataset:
    """Random rows; equal lengths unless `length` is None."""
    draw = torch.Generator().manual_seed(3)
    lengths = [length or int(torch.randint(3, 12, (), generator=draw)) for _ in range(n)]
    ids = [torch.randint(5, VOCAB, (k,), generator=draw).tolist() for k in lengths]
    labels = ids if name == "llama" else [i % 3 for i in range(n)]
    mask = [[1] * k for k in lengths]
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels, "length": lengths}
    return Dataset.from_dict(columns)


def make_phases(rows: Dataset, **settings: Any) -> Phases:
    given = {"batch_size": 8, "max_grad_norm": HUGE, "warmup_ratio": 0.0} | settings
    return Phases(
        train=rows,
        validation=rows,
        collator=Collator(0),
        compute=lambda predictions, labels: {"size": float(len(labels))},
        preprocess_logits=None,
        settings=TrainSettings(**given),
        device="cpu",
        bf16=False,
        progress=SilentProgress(),
    )


def make_net(name: str = "bert", **overrides: Any) -> nn.Module:
    model = TINY[name](**overrides)
    space = make_space(find_sites(model), sizes={"lora": 2, "serial_adapter": 2})
    head = ["classifier"] if name == "bert" else None
    return attach(model, space.full(), modules_to_save=head)


def run_phase(
    net: nn.Module, phases: Phases, *, plain: bool = False, recorder: Recorder | None = None
) -> PhaseLog:
    """One epoch. `plain`: with gradient descent, whose step shows the gradient's size."""
    settings = phases.settings
    optimizer = make_optimizer(net, settings, settings.lr)
    if plain:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    steps = n_steps(len(phases.train), settings.batch_size)
    scheduler = make_scheduler(optimizer, settings, steps)
    return phases.run(net, phases.train, optimizer, scheduler, 5, recorder)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_a_cut_batch_takes_the_same_step(name, pieces):
    rows = make_rows(name, n=8)
    start = trainable_state(make_net(name))
    states, losses = [], []
    for cut in (1, pieces):
        net = make_net(name)
        phases = make_phases(rows, gradient_accumulation=cut)
        losses.append(run_phase(net, phases, plain=True).loss)
        states.append(trainable_state(net))
    assert_close(states[1], states[0], rtol=0, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert max((start[n] - states[0][n]).abs().max() for n in start) > 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pieces_of_unequal_size_and_length_count_by_their_labels(name):
    states, outputs = [], []
    for cut in (1, 3):
        net = make_net(name)
        phases = make_phases(make_rows(name, n=16, length=None), gradient_accumulation=cut)
        with Recorder.for_net(net, output_every=1) as recorder:
            run_phase(net, phases, plain=True, recorder=recorder)
            outputs.append(recorder.read().output_abs_mean)
        states.append(trainable_state(net))
    assert_close(states[1], states[0], rtol=0, atol=1e-6)
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=0)
    assert outputs[0].max() > 0


def test_a_step_has_the_gradient_of_the_models_own_loss():
    net, rows = make_net(), make_rows(n=8)
    (batch,) = batch_indices(rows["length"], 8, 1, 5)
    inputs = Collator(0)([rows[i] for i in batch])
    net.train()
    before = trainable_state(net)
    loss = net(**inputs).loss
    loss.backward()
    expected = {n: before[n] - 0.1 * p.grad for n, p in net.named_parameters() if n in before}
    net.zero_grad()
    log = run_phase(net, make_phases(rows), plain=True)
    assert_close(trainable_state(net), expected, rtol=0, atol=1e-6)
    assert (log.steps, log.loss) == (1, pytest.approx(loss.item(), abs=1e-6))


def test_same_seed_same_bits_with_dropout_and_lengths():
    results = []
    for _ in range(2):
        net = make_net(hidden_dropout_prob=0.2)
        torch.rand(3)  # what was drawn before does not matter
        log = run_phase(net, make_phases(make_rows(n=30, length=None), max_grad_norm=1.0))
        results.append((trainable_state(net), log.loss, log.steps))
    assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1:] == results[1][1:]
    assert results[0][2] == 3


def test_the_recorder_sees_gradients_before_they_are_clipped():
    records = []
    for norm in (HUGE, 1e-4):
        net = make_net()
        with Recorder.for_net(net, {"gradients"}) as recorder:
            run_phase(net, make_phases(make_rows(n=8), max_grad_norm=norm), recorder=recorder)
            records.append(recorder.read())
    assert records[0].steps == 1
    assert_close(records[0].abs_grad_mean, records[1].abs_grad_mean, rtol=0, atol=0)
    assert records[0].abs_grad_mean.max() > 1e-4


def test_clipping_bounds_the_step():
    net = make_net()
    before = trainable_state(net)
    run_phase(net, make_phases(make_rows(n=8), max_grad_norm=1e-3), plain=True)
    after = trainable_state(net)
    norm = sum((after[n] - before[n]).square().sum() for n in before).sqrt()
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_frozen_weights_stay_and_evaluation_changes_nothing():
    net, phases = make_net(), make_phases(make_rows())
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    run_phase(net, phases)
    trained = trainable_state(net)
    metrics = phases.evaluate(net)
    assert metrics["size"] == 24
    assert metrics["loss"] > 0
    assert_close({n: p for n, p in net.named_parameters() if n in frozen}, frozen, rtol=0, atol=0)
    assert_close(trainable_state(net), trained, rtol=0, atol=0)


def test_batch_normalisation_of_the_frozen_base_keeps_its_statistics():
    """Else what one trial finds depends on those that were run before it."""
    net, phases = make_net(), make_phases(make_rows(length=7))
    norm = net.base_model.model.bert.encoder.layer[0].output.dropout = nn.BatchNorm1d(7)
    before = {n: b.clone() for n, b in norm.named_buffers()}
    run_phase(net, phases)
    assert_close(dict(norm.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("length", [7, None])
def test_the_validation_loss_is_the_mean_over_rows(length):
    net, rows = make_net().eval(), make_rows(n=10, length=length)
    losses = [net(**Collator(0)([row])).loss.item() for row in rows]
    found = make_phases(rows, eval_batch_size=4).evaluate(net)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["size"] == 10


def test_a_loss_that_is_not_finite_stops_the_phase():
    net = make_net()
    with torch.no_grad():
        next(iter(next(iter(slot_parameters(net).values())).values())).fill_(float("nan"))
    with pytest.raises(StateError, match=r"loss became nan; lower train.lr \(now 0.0005\)"):
        run_phase(net, make_phases(make_rows()))


# --- lack of memory ----------------------------------------------------------------------------


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """Make every micro-batch of more rows fail late in the first step; returns sizes seen."""
    seen: list[int] = []
    original = PhaseTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        seen.append(len(inputs["labels"]))
        if seen[-1] > rows and len(seen) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(PhaseTrainer, "training_step", step)
    return seen


def test_lack_of_memory_halves_the_pieces_and_repeats_the_phase(monkeypatch):
    expected = make_net()
    run_phase(expected, make_phases(make_rows(), gradient_accumulation=4), plain=True)
    seen = out_of_memory_above(monkeypatch, 2)
    net, phases = make_net(), make_phases(make_rows())
    with Recorder.for_net(net, {"gradients"}) as recorder:
        run_phase(net, phases, plain=True, recorder=recorder)
    assert phases.pieces == 4
    assert recorder.steps == 3
    assert seen == [8, 8, 4, *[2] * 12]
    assert_close(trainable_state(net), trainable_state(expected), rtol=0, atol=0)


def test_lack_of_memory_even_for_single_rows_is_reported(monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError, match="each batch of 8 cut into"):
        run_phase(make_net(), make_phases(make_rows()))


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(PhaseTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_phase(make_net(), make_phases(make_rows()))


def test_a_step_smaller_than_the_number_of_processes_is_refused():
    phases = make_phases(make_rows())
    phases.pieces = 4
    assert phases._cuts(8, 1) == 4
    assert phases._cuts(8, 3) == 6
    assert phases._cuts(3, 2) == 2
    with pytest.raises(ConfigError, match="a step of 1 rows cannot be shared by 2 processes"):
        phases._cuts(1, 2)


# --- optimiser ---------------------------------------------------------------------------------


def test_optimizer_groups():
    net = make_net()
    settings = TrainSettings(lr_by_kind={"lora": 0.25}, weight_decay=0.5)
    optimizer = make_optimizer(net, settings, 0.125)
    where = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert where.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        group = where[id(parameter)]
        assert group["lr"] == (0.25 if "union_lora" in name else 0.125), name
        assert group["weight_decay"] == (0.5 if parameter.ndim == 2 else 0.0), name
    assert {p.ndim for p in trained.values()} == {1, 2}
    assert any("classifier" in name for name in trained)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = TrainSettings(lr_schedule=schedule, warmup_ratio=0.3)
    scheduler = make_scheduler(optimizer, settings, 6)
    rates = []
    for _ in expected:
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-5)


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_phase(make_net(), make_phases(make_rows()))
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_below_all_modules_are_not_back_propagated(name, recompute):
    model = TINY[name](num_hidden_layers=3)
    full = make_space(find_sites(model), ("lora",), sizes={"lora": 2}).full()
    net = attach(model, full.without([s.id for s in full if s.layer < 2]))
    blocks = model.bert.encoder.layer if name == "bert" else model.model.layers
    seen = {0: [], 1: [], 2: []}
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, y, n=number: seen[n].append(y.requires_grad))
    before = trainable_state(net)
    run_phase(net, make_phases(make_rows(name), gradient_checkpointing=recompute))
    assert not any(seen[0] + seen[1])
    assert all(seen[2])
    assert any((before[n] != t).any() for n, t in trainable_state(net).items())
