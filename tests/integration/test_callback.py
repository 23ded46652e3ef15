"""PruneCallback in a user's own Trainer: the budget is met in place, and failures are loud."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunepeft import PruneCallback, attach, detach, placement_of
from prunepeft.candidates import make_space
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.kinds import cost, count_params
from prunepeft.sites import find_sites
from prunepeft.space import Placement
from prunepeft.supernet import n_trainable
from prunepeft.supernet.layer import UnionLayer
from tests.tiny_models import TINY, VOCAB, tiny_inputs

STEPS = 12
KINDS = ("lora", "serial_adapter", "parallel_adapter")


class Watch(TrainerCallback):
    """Notes after each step what trains and what the optimiser holds."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.strays: list[int] = []
        self.frozen: list[bool] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.sizes.append(n_trainable(model)[0])
        alive = {id(p) for p in model.parameters()}
        inner = optimizer.optimizer
        held = [p for group in inner.param_groups for p in group["params"]]
        self.strays.append(sum(id(p) not in alive for p in [*held, *inner.state]))
        now = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.frozen.append(all(torch.equal(self.before[n], p) for n, p in now.items()))


def make_rows(n: int = 32) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (n, 6), generator=draw)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def make_net(**overrides: Any) -> PeftModel:
    base = TINY["bert"](**overrides)
    space = make_space(find_sites(base), KINDS, sizes=dict.fromkeys(KINDS, 4))
    return attach(base, space.full(), modules_to_save=["classifier"], task_type="SEQ_CLS")


def make_trainer(net: Any, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    given = {"save_strategy": "no", "max_steps": STEPS, "learning_rate": 5e-3} | settings
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **given,
    )
    rows = make_rows()
    return Trainer(
        model=net, args=args, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks)
    )


def full_cost(unit: str = "parameters") -> int:
    return cost(placement_of(make_net()), unit)


@pytest.mark.parametrize(
    "settings",
    [
        {"rounds": 3},
        {"rounds": 1, "criteria": ["snip"]},
        {"rounds": 4, "criteria": ["gradient", "activation", "zeros"], "end": 0.9},
    ],
)
def test_the_budget_is_met_in_place_and_training_goes_on(tmp_path, settings):
    limit = full_cost() // 3
    net, watch = make_net(), Watch()
    callback = PruneCallback(limit, **settings)
    make_trainer(net, tmp_path, callback, watch).train()
    placement = callback.placement
    assert placement == placement_of(net)
    assert 0 < count_params(placement) <= limit
    assert len(callback.history) == settings["rounds"]
    last = callback.history[-1]["step"]
    assert last == round(STEPS * settings.get("end", 0.5))
    assert watch.sizes[0] == full_cost()
    assert watch.sizes[last - 1 :] == [count_params(placement)] * (STEPS - last + 1)
    assert watch.sizes == sorted(watch.sizes, reverse=True)
    assert watch.strays == [0] * STEPS
    assert not any(watch.frozen)
    gone = {i for event in callback.history for i in event["removed"]}
    assert gone | set(placement.ids) == set(placement_of(make_net()).ids)
    assert not gone & set(placement.ids)
    layers = [m for m in net.modules() if isinstance(m, UnionLayer)]
    assert len(layers) == len({s.path for slot in placement for s in slot.sites})
    assert all(layer.observer is None for layer in layers)


@pytest.mark.parametrize(("budget", "unit"), [("2 modules", "modules"), ("rank:9", "rank")])
def test_other_units(tmp_path, budget, unit):
    net = make_net()
    callback = PruneCallback(budget)
    make_trainer(net, tmp_path, callback).train()
    assert cost(callback.placement, unit) == {"modules": 2, "rank": 8}[unit]


def test_a_checkpoint_holds_the_pruned_placement_and_reloads(tmp_path):
    net = make_net()
    callback = PruneCallback(full_cost() // 3, rounds=2)
    make_trainer(net, tmp_path, callback, save_strategy="steps", save_steps=4).train()
    checkpoints = {n: tmp_path / f"checkpoint-{n}" for n in (4, 8, STEPS)}
    loaded = {n: PeftModel.from_pretrained(TINY["bert"](), p) for n, p in checkpoints.items()}
    sizes = {n: count_params(placement_of(loaded[n])) for n in loaded}
    assert full_cost() > sizes[4] > sizes[8] == sizes[STEPS] == count_params(callback.placement)
    final = loaded[STEPS].eval()
    inputs = tiny_inputs("bert", final)
    with torch.no_grad():
        assert_close(final(**inputs).logits, net.eval()(**inputs).logits, rtol=0, atol=0)


def test_the_base_is_restored_afterwards(tmp_path):
    net = make_net()
    before = copy.deepcopy(TINY["bert"]().state_dict())
    make_trainer(net, tmp_path, PruneCallback("2 modules")).train()
    assert_close(detach(net).state_dict(), before, rtol=0, atol=0)


def test_pruned_training_equals_itself(tmp_path):
    kept = []
    for _ in range(2):
        callback = PruneCallback(full_cost() // 3)
        make_trainer(make_net(), tmp_path, callback).train()
        kept.append(callback.placement)
    assert kept[0] == kept[1]


def test_evaluation_between_prune_events_changes_nothing(tmp_path):
    kept = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        callback = PruneCallback(full_cost() // 3, criteria=["activation", "snip"])
        make_trainer(make_net(), tmp_path, callback, **settings).train()
        kept.append(callback.placement)
    assert kept[0] == kept[1]


def test_the_callback_serves_a_second_training(tmp_path):
    callback = PruneCallback("2 modules", rounds=2)
    for _ in range(2):
        net = make_net()
        make_trainer(net, tmp_path, callback).train()
        assert len(callback.history) == 2
        assert callback.placement == placement_of(net)


# --- loud failures ------------------------------------------------------------------------------


def test_a_callback_that_never_ran_says_so():
    with pytest.raises(StateError, match="this PruneCallback never ran"):
        _ = PruneCallback("2 modules").placement


@pytest.mark.parametrize("steps", [1, 2])
def test_a_training_too_short_fails_at_its_end(tmp_path, steps):
    trainer = make_trainer(make_net(), tmp_path, PruneCallback("2 modules"), max_steps=steps)
    with pytest.raises(StateError, match=f"{steps} of 3 prune events ran .* Train longer"):
        trainer.train()


def test_a_training_that_is_stopped_early_fails_at_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(make_net(), tmp_path, PruneCallback("2 modules"), Stop())
    with pytest.raises(StateError, match="training ended after 3 steps"):
        trainer.train()


def test_loading_the_best_checkpoint_is_refused(tmp_path):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make_trainer(make_net(), tmp_path, PruneCallback("2 modules"), **settings)
    with pytest.raises(ConfigError, match="load_best_model_at_end would load a checkpoint"):
        trainer.train()


@pytest.mark.parametrize("plain", [True, False])
def test_a_model_that_is_no_union_is_refused(tmp_path, plain):
    model = TINY["bert"]()
    if not plain:
        model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    trainer = make_trainer(model, tmp_path, PruneCallback("2 modules"))
    with pytest.raises(StateError, match=r"is not a prunepeft union .* prunepeft.attach"):
        trainer.train()


def test_a_budget_below_the_smallest_module_is_refused(tmp_path):
    trainer = make_trainer(make_net(), tmp_path, PruneCallback(5))
    with pytest.raises(BudgetError, match="the smallest module costs"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rounds": 0}, "needs rounds >= 1"),
        ({"start": 0.6, "end": 0.5}, "0 <= start < end <= 1"),
        ({"end": 1.5}, "0 <= start < end <= 1"),
        ({"criteria": ["snip"], "strategy": {}}, "either strategy or criteria"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        PruneCallback("1%", **settings)


def test_after_an_error_in_training_the_model_can_be_trained_again(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broke off")

    net, callback = make_net(), PruneCallback("2 modules", criteria=["activation"])
    with pytest.raises(RuntimeError, match="broke off"):
        make_trainer(net, tmp_path, callback, Break()).train()
    make_trainer(net, tmp_path, callback).train()
    assert isinstance(callback.placement, Placement)
    assert len(callback.placement) == 2
