"""Frozen layers that run once per row: the same function, the same training, and when not."""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

from prunepeft import attach, find_sites, make_space
from prunepeft.batches import n_steps
from prunepeft.config import TrainSettings
from prunepeft.kinds import seeded
from prunepeft.prefix.maker import StateMaker, rows_digest
from prunepeft.prefix.player import PrefixPlayer, frozen_prefix
from prunepeft.prefix.reuse import PrefixReuse, describe
from prunepeft.prefix.states import KeptStates
from prunepeft.progress import SilentProgress
from prunepeft.space import Placement
from prunepeft.supernet import detach, trainable_state
from prunepeft.tasks import Collator
from prunepeft.training import Phases, make_optimizer, make_scheduler
from tests.tiny_models import MORE, TINY, VOCAB, make_tiny, tiny_inputs

GB = 10**9
ALL = {**TINY, **MORE}
LOSSES = {"bert": "seq-cls", "llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq-cls"}


def upper(model: nn.Module, layer: int = 1, stack: str | None = None) -> Placement:
    """LoRA and adapters in the layers from `layer` on; of two stacks in the decoder alone."""
    full = make_space(find_sites(model), ("lora", "serial_adapter"), target_params=3000).full()
    stacks = [slot.sites[0].stack for slot in full]
    stack = stack or ("decoder" if "decoder" in stacks else "encoder")
    low = [s.id for s in full if s.sites[0].stack != stack or s.sites[0].layer < layer]
    return full.without(low)


def shaken(net: PeftModel) -> PeftModel:
    """Modules that do something: at first many are the identity."""
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=seeded(2, path))
    return net


def make_net(name: str, head: str | None = None, **overrides: Any) -> PeftModel:
    model = make_tiny(name, head, **overrides)
    return shaken(attach(model, upper(model)))


def labelled(name: str, net: PeftModel) -> dict[str, Tensor]:
    base = net.get_base_model()
    inputs = tiny_inputs(name, base, batch=3)
    if "pixel_values" in inputs:
        return inputs | {"labels": torch.tensor([0, 1, 2])}
    if "decoder_input_ids" in inputs:
        return inputs | {"labels": inputs.pop("decoder_input_ids")}
    if hasattr(base, "classifier"):
        return inputs | {"labels": torch.tensor([0, 1, 2])}
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def gradients(net: PeftModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    net.zero_grad(set_to_none=True)
    loss = net(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALL))
def test_played_back_states_give_the_same_output_loss_and_gradients(name: str) -> None:
    net = make_net(name)
    player = PrefixPlayer(net, frozen_prefix(net))
    batch = labelled(name, net)
    assert player.prefix[-1].paths
    with torch.no_grad():
        states = player.take(batch)
        wanted = net.eval()(**batch)["logits"]
        with player.play(states):
            assert torch.equal(net(**batch)["logits"], wanted)
        assert torch.equal(net(**batch)["logits"], wanted)
    net.train()  # these models have no dropout
    loss, wanted = gradients(net, batch)
    with player.play(states):
        played, found = gradients(net, batch)
    assert (played, found.keys()) == (loss, wanted.keys())
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert len(wanted) > 3
    assert player.is_independent(batch)


def test_skipped_blocks_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net("llama", num_hidden_layers=4)
    runs: list[int] = []
    for number, block in enumerate(net.get_base_model().model.layers):
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *a, n=number, f=forward, **k: runs.append(n) or f(*a, **k)
        )
    batch = labelled("llama", net)
    prefix = frozen_prefix(net)
    assert [len(s.paths) for s in prefix] == [1]
    player = PrefixPlayer(net, prefix)
    with torch.no_grad():
        states = player.take(batch)
    assert runs == [0]  # nothing above the prefix
    with player.play(states):
        net(**batch)
    assert runs == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError), player.play(states):
        raise ZeroDivisionError
    net(**batch)
    assert runs[4:] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stack", "layer", "expected"),
    [
        ("encoder", 0, []),
        ("encoder", 1, [("encoder", 1)]),
        ("decoder", 0, [("encoder", 2)]),
        ("decoder", 1, [("encoder", 2), ("decoder", 1)]),
    ],
)
def test_a_decoder_counts_only_behind_a_frozen_encoder(stack, layer, expected) -> None:
    model = TINY["t5"]()
    net = attach(model, upper(model, layer, stack))
    assert [(s.stack, len(s.paths)) for s in frozen_prefix(net)] == expected


def test_what_is_trained_in_a_block_ends_the_prefix() -> None:
    model = TINY["bert"](num_hidden_layers=4)
    net = attach(model, upper(model, 3))
    assert len(frozen_prefix(net)[0].paths) == 3
    model.bert.encoder.layer[1].output.LayerNorm.weight.requires_grad_(True)
    assert len(frozen_prefix(net)[0].paths) == 1
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    player = PrefixPlayer(net, frozen_prefix(net))
    assert not player.is_independent(labelled("bert", net))


def test_input_gradients_for_recomputation_are_no_training() -> None:
    net = make_net("llama")
    net.get_base_model().enable_input_require_grads()
    assert PrefixPlayer(net, frozen_prefix(net)).is_independent(labelled("llama", net))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_states_come_back_for_any_rows_in_any_order_and_width(lengths, random) -> None:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    kept = KeptStates({"encoder": torch.zeros(starts[-1], 3)}, starts)
    truth = [torch.randn(n, 3) for n in lengths]
    order = random.sample(range(len(lengths)), len(lengths))
    for row in order:
        kept.write(row, {"encoder": truth[row][None]}, 0)
    rows = random.choices(range(len(lengths)), k=5)
    width = max(lengths[r] for r in rows) + random.randint(0, 3)
    found = kept.read(rows, width)["encoder"]
    assert found.shape == (5, width, 3)
    for place, row in enumerate(rows):
        assert torch.equal(found[place, : lengths[row]], truth[row])
        assert not found[place, lengths[row] :].any()


# --- the same training ---------------------------------------------------------------------------


def make_rows(name: str, n: int = 26) -> Dataset:
    draw = torch.Generator().manual_seed(3)
    if name == "vit":
        return Dataset.from_dict({"seed": list(range(n)), "labels": [i % 3 for i in range(n)]}).map(
            lambda row: {"length": 1}
        )
    lengths = [int(torch.randint(3, 12, (), generator=draw)) for _ in range(n)]
    ids = [[*torch.randint(5, VOCAB, (k - 1,), generator=draw).tolist(), 2] for k in lengths]
    labels = [i % 3 for i in range(n)] if LOSSES[name] == "seq-cls" else ids
    mask = [[1] * k for k in lengths]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": mask, "labels": labels, "length": lengths}
    )


def pixels(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    images = [torch.randn(3, 8, 8, generator=seeded(r["seed"], "image")) for r in rows]
    labels = torch.tensor([r["labels"] for r in rows])
    return {"pixel_values": torch.stack(images), "labels": labels}


def make_phases(
    name: str, place: Path, gb: float = 1.0, rows: Dataset | None = None, **settings: Any
) -> Phases:
    rows = make_rows(name) if rows is None else rows
    given = {"batch_size": 8, "lr": 1e-2, "eval_batch_size": 5} | settings
    return Phases(
        train=rows,
        validation=make_rows(name, 9).sort("length"),
        collator=pixels if name == "vit" else Collator(0),
        compute=lambda predictions, labels: {"size": float(len(labels))},
        preprocess_logits=lambda logits, labels: labels.flatten()[:1],
        settings=TrainSettings(**given),
        device="cpu",
        bf16=False,
        progress=SilentProgress(),
        prefix=PrefixReuse(int(gb * GB), place),
    )


def net_of(name: str, **overrides: Any) -> PeftModel:
    model = make_tiny(name, LOSSES.get(name), **overrides)
    heads = {"bert": ["classifier", "pooler"], "t5": ["classification_head"], "vit": ["classifier"]}
    return attach(model, upper(model), modules_to_save=heads.get(name), seed=1)


def trained(
    net: PeftModel, phases: Phases, epochs: int = 3
) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of every epoch in training and on the validation rows, and the weights at the end."""
    optimizer = make_optimizer(net, phases.settings, phases.settings.lr)
    steps = n_steps(len(phases.train), phases.settings.batch_size) * epochs
    scheduler = make_scheduler(optimizer, phases.settings, steps)
    losses = []
    with phases.reusing(net, phases.train, epochs, "training"):
        for epoch in range(epochs):
            losses.append(phases.run(net, phases.train, optimizer, scheduler, epoch).loss)
            losses.append(phases.evaluate(net)["loss"])
    return losses, trainable_state(net)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("bert", "llama", "gpt2", "t5", "vit")),
        ("bert", {"gradient_accumulation": 3}),
        ("llama", {"gradient_accumulation": 2, "gradient_checkpointing": True}),
        ("t5", {"gradient_checkpointing": True}),
    ],
)
def test_training_is_the_same(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    plain = trained(net_of(name), make_phases(name, tmp_path, 0, **settings), epochs=2)
    phases = make_phases(name, tmp_path, **settings)
    calls = count_steps(phases)
    found = trained(net_of(name), phases, epochs=2)
    assert calls["made"] == 2  # training and validation rows
    assert found[0] == pytest.approx(plain[0], abs=2e-5)
    assert_close(found[1], plain[1], rtol=0, atol=2e-5)
    assert plain[0][0] != pytest.approx(plain[0][2], abs=1e-3)  # it learns
    assert not list(tmp_path.iterdir())  # files without a name


def count_steps(phases: Phases) -> dict[str, int]:
    """How often states were made."""
    calls = {"made": 0}
    make = StateMaker.make

    def counted(self: StateMaker, *args: Any) -> KeptStates:
        calls["made"] += 1
        return make(self, *args)

    phases.prefix._states = partial(counted_states, phases.prefix, counted)
    return calls


def counted_states(reuse: PrefixReuse, make: Any, maker: StateMaker, *args: Any) -> KeptStates:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateMaker, "make", make)
        return PrefixReuse._states(reuse, maker, *args)


def test_frozen_layers_do_not_run_in_the_steps(tmp_path: Path) -> None:
    net, phases = net_of("bert", num_hidden_layers=3), make_phases("bert", tmp_path)
    rows_through = [0, 0, 0]
    for number, block in enumerate(net.get_base_model().bert.encoder.layer):
        query = block.attention.self.query
        query.register_forward_hook(lambda m, a, y, n=number: count(rows_through, n, len(y)))
    trained(net, phases, epochs=4)
    n_rows = len(phases.train) + len(phases.validation)
    steps = 4 * (n_steps(len(phases.train), 8) * 8 + len(phases.validation))
    look = 2 + 2 + 2 + 2  # the check: alone, together, and whether it learns; not skipped once
    assert rows_through[0] <= n_rows + look
    assert rows_through[2] >= steps


def count(totals: list[int], place: int, n: int) -> None:
    totals[place] += n


def test_dropout_is_off_in_frozen_layers_and_on_above(tmp_path: Path) -> None:
    net = net_of("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    phases = make_phases("bert", tmp_path)
    batch = phases.collator(phases.train.__getitems__([0, 1]))
    net.eval()
    player = PrefixPlayer(net, frozen_prefix(net))
    with torch.no_grad():
        wanted = player.take(batch)["encoder"]
    net.train()
    with phases.reusing(net, phases.train, 2, "look"):
        states = phases.prefix.of(phases.train)
        width = batch["input_ids"].shape[1]
        kept = states.kept.read([0, 1], width)["encoder"]
        given = {"encoder": kept}
        with states.player.play(given), torch.no_grad():
            first, second = net(**batch).logits, net(**batch).logits
    mask = batch["attention_mask"].bool()
    assert_close(kept[mask], wanted[mask], rtol=0, atol=1e-5)
    assert not torch.allclose(first, second)  # the layers above drop out
    assert net.training


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    whole = trained(net_of("bert"), make_phases("bert", tmp_path), epochs=2)
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    optimizer = make_optimizer(net, phases.settings, phases.settings.lr)
    scheduler = make_scheduler(optimizer, phases.settings, 6)
    losses = []
    for epoch in range(2):  # states are made again in each, as a new process would
        again = make_phases("bert", tmp_path)
        with again.reusing(net, again.train, 2, "training"):
            losses.append(again.run(net, again.train, optimizer, scheduler, epoch).loss)
            losses.append(again.evaluate(net)["loss"])
    assert losses == whole[0]
    assert all(torch.equal(t, whole[1][n]) for n, t in trainable_state(net).items())


# --- when it is used -----------------------------------------------------------------------------


def used(net: PeftModel, phases: Phases, rows: Dataset | None = None, epochs: int = 2) -> bool:
    rows = phases.train if rows is None else rows
    with phases.reusing(net, rows, epochs, "look"):
        return phases.prefix.of(rows) is not None


def test_rows_seen_once_are_not_worth_it_unless_they_come_again(tmp_path: Path) -> None:
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    few = phases.train.select(range(9))
    assert used(net, phases, few, epochs=2)
    assert not used(net, phases, few, epochs=1)
    assert used(net, phases, epochs=1)
    assert not used(net, make_phases("bert", tmp_path, 0))
    assert phases.prefix.of(phases.train) is None  # over


def test_states_are_shared_by_trainings_with_the_same_rows_and_frozen_layers(
    tmp_path: Path,
) -> None:
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    calls = count_steps(phases)
    base = net.get_base_model()
    assert used(net, phases)
    assert used(net, phases)
    assert calls["made"] == 2
    base = detach(net)
    other = attach(base, upper(base), modules_to_save=["classifier", "pooler"], seed=9)
    assert used(other, phases)  # other values of modules and head
    assert calls["made"] == 2
    with torch.no_grad():
        base.bert.encoder.layer[1].output.dense.weight.mul_(2)  # above the prefix
    assert used(other, phases)
    assert calls["made"] == 2
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.weight.mul_(2)
    assert used(other, phases)
    assert calls["made"] == 4
    base.bert.embeddings.word_embeddings.weight.data = (
        base.bert.embeddings.word_embeddings.weight.data.clone() * 1.5
    )
    assert used(other, phases)
    assert calls["made"] == 6


def test_old_states_go_when_there_is_no_room(tmp_path: Path) -> None:
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    one = sum(phases.train["length"]) * 16 * 4
    phases.prefix.limit = int(1.7 * one)
    assert used(net, phases)
    reuse = phases.prefix
    kept = [n for _, n in reuse._kept.values()]
    assert sum(kept) <= reuse.limit
    others = make_rows("bert", 25)
    assert used(net, phases, others)
    assert sum(n for _, n in reuse._kept.values()) <= reuse.limit
    phases.prefix.limit = one - 1
    assert not used(net, phases)


def side_door(model: nn.Module) -> None:
    """Let the second layer read something of the first that is not its output."""
    first, second = model.bert.encoder.layer
    seen: list[Tensor] = []
    first.attention.self.query.register_forward_hook(lambda m, a, y: seen.append(y.detach().mean()))
    second.register_forward_pre_hook(lambda m, args: (args[0] + seen[-1], *args[1:]))


@pytest.mark.parametrize(
    ("name", "overrides", "spoil", "reason"),
    [
        ("bert", {}, lambda m: m.bert.embeddings.requires_grad_(True), "trained acts before them"),
        ("opt", {"layerdrop": 0.1}, None, "layers drop out at random"),
        ("bert", {}, side_door, "the model reads more than their output"),
    ],
)
def test_models_whose_prefix_cannot_be_replaced_are_left_alone(
    name: str,
    overrides: dict[str, Any],
    spoil: Callable[[nn.Module], Any] | None,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    LOSSES.setdefault("opt", "causal-lm")
    model = make_tiny(name, LOSSES[name], **overrides)
    net = shaken(attach(model, upper(model)))
    if spoil:
        spoil(model)
    with caplog.at_level(logging.INFO, "prunepeft"):
        assert not used(net, make_phases(name, tmp_path))
    assert reason in caplog.text


def test_a_full_disk_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plain = trained(net_of("bert"), make_phases("bert", tmp_path, 0))
    monkeypatch.setattr(os, "posix_fallocate", full)
    found = trained(net_of("bert"), make_phases("bert", tmp_path))
    assert found[0] == plain[0]
    assert "all layers run in every step" in caplog.text
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def hungry(net: PeftModel, most: int) -> None:
    """Let the first layer run out of memory for more than so many rows."""

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("out of memory (simulated)")

    net.get_base_model().bert.encoder.layer[0].register_forward_pre_hook(check)


def test_lack_of_memory_while_states_are_made_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for gb in (0.0, 1.0):
        net, phases = net_of("bert"), make_phases("bert", tmp_path, gb)
        hungry(net, 4)
        found.append(trained(net, phases, epochs=2)[0])
        assert phases.pieces == 2
        assert not phases.prefix.is_used
    assert found[0] == found[1]
    assert "for lack of memory" in caplog.text


def test_states_of_a_training_that_failed_are_not_used_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    make = StateMaker.make

    def breaks(self: StateMaker, rows: Dataset, *args: Any) -> KeptStates:
        if rows is phases.validation:
            raise ZeroDivisionError
        return make(self, rows, *args)

    monkeypatch.setattr(StateMaker, "make", breaks)
    with pytest.raises(ZeroDivisionError), phases.reusing(net, phases.train, 2, "look"):
        raise AssertionError
    assert not phases.prefix.is_used


class Returns(nn.Module):
    """A layer that returns another form than hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"states": self.layer(*args, **kwargs)}


@pytest.mark.parametrize("how", ["returns a dict", "is not called as a module"])
def test_layers_of_an_odd_form_run_in_every_step(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = net_of("bert")
    layers = net.get_base_model().bert.encoder.layer
    if how == "returns a dict":
        layers[0] = Returns(layers[0])
        layers[1].register_forward_pre_hook(lambda m, a: (a[0]["states"], *a[1:]))
    else:
        first = layers[0]
        call = first.forward
        first.forward = lambda *args, **kwargs: call(*args, **kwargs)
        encoder = net.get_base_model().bert.encoder

        def run(states: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            states = layers[1](first.forward(states, mask), mask)
            return BaseModelOutput(last_hidden_state=states)

        encoder.forward = run
    with caplog.at_level(logging.INFO, "prunepeft"):
        assert not used(net, make_phases("bert", tmp_path))
    assert "do not hand on hidden states" in caplog.text


def test_half_of_the_disk_is_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, phases = net_of("bert"), make_phases("bert", tmp_path)
    n_bytes = 16 * 4 * sum(phases.train["length"])
    free = {"bytes": 2 * n_bytes}
    phases.validation = phases.train.select([*range(len(phases.train)), 0])
    monkeypatch.setattr("prunepeft.prefix.reuse.disk_free", lambda folder: free["bytes"])
    with phases.reusing(net, phases.train, 2, "look"):
        assert phases.prefix.of(phases.train) is not None
        assert phases.prefix.of(phases.validation) is None
    assert "half of what is free on the disk" in caplog.text
    free["bytes"] = 0
    assert used(net, phases)  # what is kept already is there
    assert not used(net, make_phases("bert", tmp_path))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_evaluation_gives_the_same_numbers_in_bfloat16(name: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    model = make_tiny(name, LOSSES[name], **wide).to(torch.bfloat16)
    net = shaken(attach(model, upper(model, 2)))
    phases = make_phases(name, tmp_path)
    phases.bf16 = True
    plain = phases.evaluate(net)["loss"]
    with phases.reusing(net, phases.train, 2, "look"):
        assert phases.prefix.of(phases.validation) is not None
        assert phases.evaluate(net)["loss"] == plain


def test_digest_of_rows_is_that_of_what_the_model_reads() -> None:
    rows = make_rows("bert")
    digest = rows_digest(rows)
    assert digest == rows_digest(make_rows("bert"))
    assert digest == rows_digest(rows.map(lambda row: {"labels": 0}))
    taken = rows.select(range(5, 20))
    assert rows_digest(taken) == rows_digest(Dataset.from_dict(taken[:])) != digest
    shuffled = rows.shuffle(seed=1)
    assert rows_digest(shuffled) != digest
    assert rows_digest(shuffled.select(sorted(range(26), key=lambda i: i))) != digest


def test_the_line_says_what_is_saved() -> None:
    assert describe(5, 6, 2_000_000, 3).endswith("(2 MB), saves about 48% of the operations")
    assert (
        describe(1, 2, 0, 1) == "output of 1 of 2 layers kept (0 MB) for this and later trainings"
    )


def test_without_a_cache_nothing_happens(tmp_path: Path) -> None:
    phases = make_phases("bert", tmp_path)
    phases.prefix = None
    assert isinstance(phases.reusing(net_of("bert"), phases.train, 3, "look"), nullcontext)
