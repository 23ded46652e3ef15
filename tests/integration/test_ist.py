"""IST in trainings: what moves, what is saved, and that a resumed training equals a whole one."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunepeft import IstCallback, IstSettings, attach, find_sites, make_space, run
from prunepeft.config import load_config
from prunepeft.errors import CheckpointError, ConfigError, StateError
from prunepeft.sparse_tuning import peft_layers
from prunepeft.supernet import trainable_state
from tests.tiny_models import TINY, VOCAB
from tests.tiny_tokenizer import save_tiny_model

STEPS = 8
FAST = IstSettings(layers=0.25, every=2, probe_rows=4, score_lr=1e3)
FAMILIES = ("bert", "llama", "t5")
DEEP = {"num_hidden_layers": 4}


def make_rows(name: str = "bert", n: int = 32) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (n, 6), generator=draw)
    return [{"input_ids": row, "labels": row[0] % 3 if name == "bert" else row} for row in ids]


def union(name: str = "bert", **overrides: Any) -> PeftModel:
    base = TINY[name](**overrides)
    kinds = ("lora", "serial_adapter")
    head = ["classifier"] if name == "bert" else None
    space = make_space(find_sites(base), kinds, sizes=dict.fromkeys(kinds, 2))
    return attach(base, space.full(), modules_to_save=head)


def vanilla(dora: bool = False, **overrides: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["query", "value"],
        use_dora=dora,
        modules_to_save=["classifier"],
        lora_dropout=0.1,
    )
    return get_peft_model(TINY["bert"](**overrides), config)


class Watch(TrainerCallback):
    """Notes which parameters moved in each step, and where gradients were."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.with_gradient: list[set[str]] = []
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.with_gradient.append({n for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = model.named_parameters()
        self.moved.append({n for n, p in now if not torch.equal(self.before[n], p)})


def make_trainer(
    net: Any, folder: Path, *callbacks: TrainerCallback, name: str = "bert", **settings: Any
) -> Trainer:
    given = {"save_strategy": "no", "max_steps": STEPS, "learning_rate": 5e-3} | settings
    args = TrainingArguments(
        str(folder),
        **({"per_device_train_batch_size": 8} | given),
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=net, args=args, train_dataset=make_rows(name), callbacks=list(callbacks))


def names_of(net: PeftModel) -> tuple[list[set[str]], set[str]]:
    """Names of the parameters of each layer, and of all others that train."""
    by_id = {id(p): n for n, p in net.named_parameters()}
    layers = [{by_id[id(p)] for p in layer.parameters} for layer in peft_layers(net)]
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    return layers, trained - set().union(*layers)


# ---- in the user's Trainer ---------------------------------------------------------------------


MODELS = {
    **{name: (name, partial(union, name)) for name in FAMILIES},
    "peft-lora": ("bert", vanilla),
    "peft-dora": ("bert", partial(vanilla, dora=True)),
}


@pytest.mark.parametrize(("name", "make"), MODELS.values(), ids=MODELS)
def test_in_each_step_some_layers_move_and_the_others_not_at_all(tmp_path, name, make):
    net, watch, callback = make(), Watch(), IstCallback(FAST)
    layers, others = names_of(net)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    make_trainer(net, tmp_path, callback, watch, name=name).train()
    chosen = []
    for moved, with_gradient in zip(watch.moved, watch.with_gradient, strict=True):
        active = [i for i, own in enumerate(layers) if own & moved]
        assert len(active) == 1
        expected = layers[active[0]] | others
        assert with_gradient == expected
        assert moved <= expected
        chosen += active
    assert set(chosen) == set(range(len(layers)))  # also those that were active before
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trained
    assert set(callback.importance) == {layer.name for layer in peft_layers(net)}
    assert any(callback.importance.values())


def test_all_layers_and_no_trials_is_plain_training(tmp_path):
    nets = []
    for callbacks in ([], [IstCallback({"layers": 1.0, "sampling": "uniform"})]):
        nets.append(vanilla())
        make_trainer(nets[-1], tmp_path, *callbacks).train()
    assert_close(*(trainable_state(net) for net in nets), rtol=0, atol=0)


def test_trials_change_nothing_but_the_draws(tmp_path):
    nets = []
    for sampling in ("importance", "uniform"):
        nets.append(vanilla())
        settings = IstSettings(layers=1.0, every=1, sampling=sampling, probe_rows=4)
        make_trainer(nets[-1], tmp_path, IstCallback(settings)).train()
    assert_close(*(trainable_state(net) for net in nets), rtol=0, atol=0)


def test_the_random_control_learns_no_scores(tmp_path):
    callback = IstCallback(IstSettings(every=1, sampling="uniform"))
    make_trainer(union(), tmp_path, callback).train()
    assert set(callback.importance.values()) == {0.0}


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("make", [union, vanilla])
def test_a_resumed_training_equals_a_whole_one(tmp_path, make, settings):
    settings = settings | {"save_strategy": "steps", "save_steps": 5}
    whole, again = make(**DEEP), make(**DEEP)
    first, second = IstCallback(FAST, seed=1), IstCallback(FAST, seed=1)
    make_trainer(whole, tmp_path, first, **settings).train()
    make_trainer(again, tmp_path / "again", second, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert_close(trainable_state(whole), trainable_state(again), rtol=0, atol=0)
    assert first.importance == second.importance
    assert any(first.importance.values())
    saved = json.loads((tmp_path / "again" / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["IstCallback"]["attributes"]["saved"]["step"] == STEPS


def test_the_trainer_may_restore_the_callback_itself(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    settings |= {"restore_callback_states_from_checkpoint": True}
    whole, again = vanilla(), vanilla()
    make_trainer(whole, tmp_path, IstCallback(FAST), **settings).train()
    make_trainer(again, tmp_path / "again", IstCallback(FAST), **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert_close(trainable_state(whole), trainable_state(again), rtol=0, atol=0)


def test_resuming_with_other_settings_or_without_a_state_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(vanilla(), tmp_path / "with", IstCallback(FAST), **settings).train()
    make_trainer(vanilla(), tmp_path / "without", **settings).train()
    for place, callback, match in (
        ("with", IstCallback(FAST, seed=9), "give it the same settings and seed"),
        ("without", IstCallback(FAST), "was saved without IstCallback"),
    ):
        trainer = make_trainer(vanilla(), tmp_path / "again", callback)
        with pytest.raises(CheckpointError, match=match):
            trainer.train(resume_from_checkpoint=str(tmp_path / place / "checkpoint-2"))


def test_accumulated_steps_draw_once_and_equal_whole_ones(tmp_path):
    nets, watches = [], []
    for batch, pieces in ((8, 1), (4, 2)):
        nets.append(union(**DEEP))
        watches.append(Watch())
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": pieces,
            "max_grad_norm": 0.0,
        }
        make_trainer(nets[-1], tmp_path, IstCallback(FAST), watches[-1], **settings).train()
    assert watches[0].with_gradient == watches[1].with_gradient
    assert_close(*(trainable_state(net) for net in nets), rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [union, vanilla])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, make, reentrant):
    nets = []
    for settings in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        nets.append(make())
        make_trainer(nets[-1], tmp_path, IstCallback(FAST), **settings).train()
    assert_close(*(trainable_state(net) for net in nets), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_dropping_state_holds_moments_of_active_layers_alone(tmp_path):
    class Count(TrainerCallback):
        def __init__(self):
            self.held = []

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            states = optimizer.optimizer.state.values()
            self.held.append(sum(t.numel() for s in states for t in s.values() if t.ndim))

    held = {}
    for how in ("keep", "drop", "offload"):
        net, count = union("llama", **DEEP), Count()
        settings = IstSettings(layers=0.25, every=2, optimizer_state=how)
        make_trainer(
            net, tmp_path, IstCallback(settings), count, name="llama", max_steps=24
        ).train()
        held[how] = count.held
    size = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert set(held["drop"]) == {2 * size // 4}
    assert held["keep"][-1] == held["offload"][-1] == 2 * size


def test_after_an_error_in_training_restore_lets_all_layers_train(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broke off")

    net, callback = vanilla(), IstCallback(FAST)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="broke off"):
        make_trainer(net, tmp_path, callback, Break()).train()
    assert {n for n, p in net.named_parameters() if p.requires_grad} < trained
    callback.restore()
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trained
    make_trainer(net, tmp_path, callback).train()


def test_an_optimizer_without_some_modules_is_refused(tmp_path):
    net = vanilla()
    head = [p for n, p in net.named_parameters() if p.requires_grad and "layer.1." not in n]
    trainer = make_trainer(net, tmp_path, IstCallback(FAST))
    trainer.optimizer = torch.optim.AdamW(head)
    with pytest.raises(ConfigError, match=r"does not hold the modules of layer encoder\.1"):
        trainer.train()


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(StateError, match="never ran"):
        _ = IstCallback().importance
    trainer = make_trainer(TINY["bert"](), tmp_path, IstCallback())
    with pytest.raises(ConfigError, match="no transformer layer of this model carries"):
        trainer.train()


# ---- in our own training -----------------------------------------------------------------------


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda folder: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ist")
    save_tiny_model(folder / "model", "bert", head="base")
    rows = [{"text": f"w{i % 40} w{i % 7}", "label": i % 2} for i in range(48)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(folder, folder / "plain", {"train.epochs": 1}) | {"budget": "9 modules"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda folder: None)
        run.search(load_config(None, (), settings))
    return folder


def settings_of(place: Path, output: Path, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "data": str(place / "train.jsonl"),
        "output": str(output),
        "device": "cpu",
        "search.warmup": False,
        "search.rounds": 1,
        "train.batch_size": 8,
        "train.lr": 5e-3,
        "train.epochs": 3,
    } | more


def train(place: Path, output: Path, **more: Any) -> dict[str, Any]:
    more = {key.replace("__", "."): value for key, value in more.items()}
    given = {"arch": str(place / "plain"), "ist": "on", "ist.every": 2, "ist.score_lr": 1e3} | more
    run.train(load_config(None, (), settings_of(place, output, given)))
    result = json.loads((output / "result.json").read_text())
    return {"curve": result["train"]["curve"], "metric": result["metric"]} | adapter(output)


def adapter(output: Path) -> dict[str, bytes]:
    return {"adapter": (output / "best/adapter/adapter_model.safetensors").read_bytes()}


def events(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == "ist"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_the_command_trains_with_ist_and_says_what_layers_are_worth(place, tmp_path):
    first = train(place, tmp_path / "a")
    assert train(place, tmp_path / "c", ist="off", ist__every=10, ist__score_lr=10) != first
    assert train(place, tmp_path / "d", ist__sampling="uniform") != first
    assert [e["epoch"] for e in events(tmp_path / "a")] == [1, 2, 3]
    assert set(events(tmp_path / "a")[-1]["importance"]) == {"encoder.0", "encoder.1"}
    assert any(events(tmp_path / "a")[-1]["importance"].values())
    assert not events(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_killed_run_goes_on_exactly(place, tmp_path, monkeypatch):
    from prunepeft.training.resumable import Resumable

    expected = train(place, tmp_path / "whole", train__gradient_checkpointing=True)
    real = Resumable.save

    def save_and_die(self, epoch):
        real(self, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resumable, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(place, tmp_path / "killed", train__gradient_checkpointing=True)
    found = train(place, tmp_path / "killed", train__gradient_checkpointing=True)
    assert found["adapter"] == expected["adapter"]
    assert found["metric"] == expected["metric"]
    importance = [events(tmp_path / n)[-1]["importance"] for n in ("whole", "killed")]
    assert importance[0] == importance[1]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_lack_of_memory_repeats_the_epoch_with_the_same_layers(
    place, tmp_path, monkeypatch, caplog
):
    expected = train(place, tmp_path / "whole", train__gradient_accumulation=2)
    real, calls = Trainer.training_step, []

    def scarce(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", scarce)
    with caplog.at_level(logging.WARNING):
        found = train(place, tmp_path / "scarce")
    assert "out of memory with 1 pieces a step" in caplog.text
    assert found["adapter"] == expected["adapter"]
    importance = [events(tmp_path / n)[-1]["importance"] for n in ("whole", "scarce")]
    assert importance[0] == importance[1]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_search_uses_ist_for_its_result_alone(place, tmp_path):
    more = {"budget": "9 modules", "train.epochs": 1, "baseline": "lora"}
    config = load_config(None, ["ist=on"], settings_of(place, tmp_path / "run", more))
    run.search(config)
    histories = [
        json.loads((p / "history.json").read_text()) for p in (place / "plain", tmp_path / "run")
    ]
    assert histories[0]["rounds"][0]["saliency"] == histories[1]["rounds"][0]["saliency"]
    assert adapter(tmp_path / "run") != adapter(place / "plain")
    assert [e["name"] for e in events(tmp_path / "run")] == ["train"]
