"""Ranks from one look at the base model: scores by hand, real small models, budgets, replay."""

import json
import math
import random
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.helpers import KappaTuneSelector
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.batches import derive_seed
from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import RunConfig, TrainSettings
from prunepeft.config.methods import AllocateSettings
from prunepeft.criteria.watch import SaliencyWatcher
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.evaluate import Target
from prunepeft.kinds import cost, slot_cost
from prunepeft.progress import SilentProgress
from prunepeft.sites import find_sites
from prunepeft.space import SearchSpace
from prunepeft.state import Journal
from prunepeft.strategies import (
    METHODS,
    AdaLora,
    Allocator,
    Eva,
    Fisher,
    GoRa,
    KappaTune,
    LoraDrop,
    Problem,
)
from prunepeft.strategies.allocator import low_rank_slots
from prunepeft.strategies.explained_variance import ExplainedVariance
from prunepeft.strategies.frozen_gradients import FrozenGradients
from prunepeft.strategies.lora_drop import OutputNorms
from prunepeft.strategies.make import make_strategy
from prunepeft.strategies.module_choice import ModuleChoice
from prunepeft.supernet import attach, detach
from prunepeft.tasks import Collator
from prunepeft.training import Phases, TrainerEvaluator, calibration
from tests.tiny_models import TINY

ALL = (Eva(), GoRa(), Fisher(), LoraDrop(), KappaTune(), AdaLora())
FAMILIES = ("bert", "llama", "gpt2", "t5")  # post-norm, shared keys, transposed, two stacks
EACH = {"lora": (("q",), ("k",), ("v",), ("o",), ("up",), ("gate",), ("down",))}


def make_rows(name: str, n: int = 40) -> Dataset:
    draw = random.Random(0)
    lengths = [draw.randrange(4, 9) for _ in range(n)]
    ids = [[1, *(draw.randrange(3, 60) for _ in range(k - 1))] for k in lengths]
    labels: Any = [draw.randrange(3) for _ in range(n)] if name == "bert" else ids
    masks = [[1] * k for k in lengths]
    columns = {"input_ids": ids, "attention_mask": masks, "labels": labels, "length": lengths}
    return Dataset.from_dict(columns)


def make_evaluator(name: str, folder: Path, **train: Any) -> TrainerEvaluator:
    model = TINY[name]()
    rows = make_rows(name)
    settings = TrainSettings(**({"lr": 5e-3, "batch_size": 8} | train))
    phases = Phases(
        train=rows,
        validation=rows,
        collator=Collator(0),
        compute=lambda found, labels: {},
        preprocess_logits=None,
        settings=settings,
        device="cpu",
        bf16=False,
        progress=SilentProgress(),
    )
    head, task = (["classifier"], "SEQ_CLS") if name == "bert" else ([], "CAUSAL_LM")
    task = "SEQ_2_SEQ_LM" if name == "t5" else task
    target = Target("x", True, head, task, False, 5e-3, {"name": name})
    return TrainerEvaluator(model, phases, target, Journal(folder / "trials"), folder / "state")


def make_problem(evaluator: Any, limit: int, unit: str = "parameters", **given: Any) -> Problem:
    sites = find_sites(evaluator.model)
    space = given.pop("space", None) or make_space(sites, ["lora"], sizes={"lora": 4}, roles=EACH)
    fidelity = Fidelity(1.0, given.pop("epochs", 2))
    return Problem(space, limit, unit, evaluator, 40, fidelity, 0, batch_size=8, **given)


def state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    kinds = [(n, type(m), m.training) for n, m in model.named_modules()]
    return tensors, flags, hooks, kinds


def assert_same(before: tuple[Any, ...], model: nn.Module) -> None:
    after = state(model)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][n], t) for n, t in before[0].items())
    assert after[1:] == before[1:]
    backward_hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert not any(backward_hooks)


# --- real small models ---------------------------------------------------------------------


@pytest.mark.parametrize("call", ["score", "watch", "train"])
def test_a_training_that_fails_leaves_the_base_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator("bert", tmp_path)
    before, full = state(evaluator.model), make_problem(evaluator, 1).space.full()
    evaluator.phases.run = lambda net, *rest: (_ for _ in ()).throw(StateError("broken"))
    given: dict[str, Any] = {"name": "x", "seed": 0}
    if call != "train":
        given |= {"init_seed": 0, "fidelity": Fidelity()}
    more = {"score": [("snip",)], "watch": [SaliencyWatcher(("snip",))], "train": []}
    with pytest.raises(StateError, match="broken"):
        getattr(evaluator, call)(full, *more[call], **given)
    assert not isinstance(evaluator.model, PeftModel)
    assert_same(before, evaluator.model)


@pytest.mark.parametrize("name", FAMILIES)
def test_budget_is_used_up_the_base_stays_and_a_second_call_is_answered_from_the_journal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator(name, tmp_path)
    before, placements = state(evaluator.model), []
    problem = make_problem(evaluator, 1500)
    steps = sorted(slot_cost(s, 1, "parameters") for s in problem.space)
    for method in ALL:
        found = method.search(problem)
        assert_same(before, evaluator.model)
        spent = problem.cost(found.placement)
        # Modules chosen as wholes do not grow beyond the size of the space.
        step = steps[-1] if isinstance(method, ModuleChoice) else steps[0]
        assert problem.limit - step < spent <= problem.limit, method.name
        history = json.loads(json.dumps(found.history))
        assert history["rounds"][0]["cost_after"] == spent
        assert (found.runs, found.start) == (1, "")
        assert (found.steps == 0) == (method.name == "kappatune")
        placements.append(found.placement)
    assert len(set(placements)) > 3

    def unheard(*args: Any) -> None:
        raise AssertionError("the base model was looked at again")

    monkeypatch.setattr(calibration.BasePasses, "run", unheard)
    fresh = make_problem(make_evaluator(name, tmp_path), 1500)
    assert [method.search(fresh).placement for method in ALL] == placements


@pytest.mark.parametrize("method", [GoRa(), LoraDrop(), AdaLora()], ids=lambda m: m.name)
def test_a_look_that_was_broken_off_leaves_the_base_and_gives_the_same_later(
    method: Allocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator("bert", tmp_path)
    whole = method.search(make_problem(make_evaluator("bert", tmp_path / "whole"), 1500))
    before, passes = state(evaluator.model), []
    original = nn.Linear.forward

    def breaking(self: nn.Linear, x: Tensor) -> Tensor:
        passes.append(x)
        if len(passes) > 40:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", breaking)
    with pytest.raises(KeyboardInterrupt):
        method.search(make_problem(evaluator, 1500))
    monkeypatch.setattr(nn.Linear, "forward", original)
    assert_same(before, evaluator.model)
    again = method.search(make_problem(evaluator, 1500))
    assert again.placement == whole.placement


@pytest.mark.parametrize("unit", ["modules", "rank"])
@pytest.mark.parametrize("method", [Eva(), GoRa(), KappaTune()], ids=lambda m: m.name)
def test_other_units(method: Allocator, unit: str, tmp_path: Path) -> None:
    problem = make_problem(make_evaluator("bert", tmp_path), 9, unit)
    found = method.search(problem)
    assert problem.cost(found.placement) == 9
    scores = next(iter(found.history["rounds"][0]["saliency"].values()))
    if unit == "modules":
        assert set(found.placement.sizes.values()) == {4}
        worst = min(scores[i] for i in found.placement.ids)
        assert all(v <= worst for i, v in scores.items() if i not in found.placement.ids)


HALF = (Eva(), GoRa(), LoraDrop(), AdaLora())


@pytest.mark.parametrize("method", HALF, ids=lambda m: m.name)
def test_half_precision_and_checkpointing(method: Allocator, tmp_path: Path) -> None:
    evaluator = make_evaluator("llama", tmp_path, gradient_checkpointing=True)
    evaluator.model.to(torch.bfloat16)
    evaluator.phases.bf16 = True
    before = state(evaluator.model)
    problem = make_problem(evaluator, 1500)
    found = method.search(problem)
    assert problem.cost(found.placement) <= 1500
    scores = next(iter(found.history["rounds"][0]["saliency"].values()))
    assert all(math.isfinite(v) and v >= 0 for v in scores.values())
    for name, tensor in evaluator.model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert "forward" not in vars(evaluator.model)


@pytest.mark.parametrize("method", [*HALF, Fisher()], ids=lambda m: m.name)
def test_training_in_half_precision_goes_on_after_a_look(method, tmp_path: Path) -> None:
    evaluator = make_evaluator("bert", tmp_path)
    evaluator.model.to(torch.bfloat16)
    evaluator.model.classifier.float()
    evaluator.phases.bf16 = True
    own = set(vars(evaluator.model))
    found = method.search(make_problem(evaluator, 1500))
    assert set(vars(evaluator.model)) == own
    settings = {"name": "s", "fidelity": Fidelity(0.5), "seed": 0, "init_seed": 0}
    scored = evaluator.score(found.placement, ("snip",), **settings)
    assert math.isfinite(scored.loss)


def test_kinds_without_ranks_and_layers_taken_twice(tmp_path: Path) -> None:
    sites = find_sites(TINY["bert"]())
    evaluator = types.SimpleNamespace(model=TINY["bert"]())
    mixed = make_space(sites, ["dora", "serial_adapter", "lora"], roles={"lora": (("q",), ("k",))})
    slots = low_rank_slots(make_problem(evaluator, 100, space=mixed))
    assert {s.kind for s in slots} == {"dora"}
    adapters = make_space(sites, ["serial_adapter", "bitfit"])
    with pytest.raises(ConfigError, match=r"ranks of lora or dora.*bitfit, serial_adapter"):
        Fisher().check(make_problem(evaluator, 100, space=adapters))
    with pytest.raises(BudgetError, match="costs 32 parameters, but the budget allows 31"):
        KappaTune().check(make_problem(evaluator, 31))
    with pytest.raises(ConfigError, match="needs 10 optimiser steps and gets 5"):
        AdaLora().check(make_problem(evaluator, 100, epochs=1))


# --- scores by hand ------------------------------------------------------------------------


class Straight:
    """Passes over one linear layer, whose loss is a mean of squares."""

    def __init__(self, steps: int = 3, pieces: int = 1, *, whole: bool = True) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False)})
        self.head, self.whole, self.pieces = [], whole, pieces
        self.batches = [torch.randn(6, 4, generator=draw) for _ in range(steps)]

    def loss(self, x: Tensor) -> Tensor:
        return self.model["a"](x).square().mean()

    def learn_head(self) -> None:
        pass

    def gradients(self, weights, recorder) -> None:
        recorder.mark()
        for repeat in (True, False):
            for x in self.batches:
                for piece in x.chunk(self.pieces):
                    (self.loss(piece) / self.pieces).backward()
                recorder.step()
                self.model.zero_grad()
                if repeat:  # memory ran out
                    recorder.reset()
                    break

    def expected(self) -> list[Tensor]:
        weight = self.model["a"].weight
        return [torch.autograd.grad(self.loss(x), weight)[0] for x in self.batches]


def slot_on(path: str) -> Any:
    site = types.SimpleNamespace(path=path, d_in=4, d_out=3)
    return types.SimpleNamespace(id=path, sites=(site,))


@pytest.mark.parametrize(("pieces", "whole"), [(1, True), (1, False), (3, False)])
def test_gradient_scores_are_those_of_autograd(pieces: int, whole: bool) -> None:
    passes = Straight(pieces=pieces, whole=whole)
    grads, weight = passes.expected(), passes.model["a"].weight.detach()
    measured = {
        how: FrozenGradients([slot_on("a")], measure=how, warm_head=False).measure(passes)["a"]
        for how in ("weight_times_mean", "mean_square")
    }
    mean = torch.stack(grads).mean(0)
    assert float(measured["weight_times_mean"]) == pytest.approx(
        float((weight * mean).abs().mean())
    )
    squares = torch.stack(grads).square().mean()
    assert float(measured["mean_square"]) == pytest.approx(float(squares), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_of_a_model_do_not_depend_on_how_steps_are_cut(name: str, tmp_path: Path) -> None:
    found = []
    for pieces in (1, 3):
        evaluator = make_evaluator(name, tmp_path / str(pieces), gradient_accumulation=pieces)
        problem = make_problem(evaluator, 1500)
        scores = [
            m.search(problem).history["rounds"][0]["saliency"][m.name]
            for m in (GoRa(warm_head=False), Fisher(warm_head=False))
        ]
        found.append(scores)
    for one, three in zip(*found, strict=True):
        assert three == pytest.approx(one, rel=1e-4)


def test_ranks_of_gora_by_hand() -> None:
    wide = types.SimpleNamespace(id="wide", sites=(types.SimpleNamespace(d_in=40, d_out=60),))
    slim = types.SimpleNamespace(id="slim", sites=(types.SimpleNamespace(d_in=10, d_out=15),))
    slots = {"wide": wide, "slim": slim}
    rows = {"wide": range(0, 2000, 100), "slim": range(0, 500, 25)}
    # equal importance: ranks as 1/10 to 1/5, so 100 t + 25 * 2 t = 900
    found = dict.fromkeys(slots, torch.tensor(1.0))
    assert GoRa(min_factor=0).sizes(slots, found, rows, 900) == {"wide": 6, "slim": 12}


def test_condition_numbers_are_those_of_numpy_and_the_order_that_of_peft(tmp_path: Path) -> None:
    evaluator = make_evaluator("llama", tmp_path)
    result = KappaTune(keep=0.2).search(make_problem(evaluator, 1500))
    scores = result.history["rounds"][0]["saliency"]["kappatune"]
    paths = {s.id: s.sites[0].path for s in make_problem(evaluator, 1).space}
    for slot_id, path in paths.items():
        weight = evaluator.model.get_submodule(path).weight.detach().double().numpy()
        assert 1 / scores[slot_id] == pytest.approx(np.linalg.cond(weight), rel=1e-3)
    order = KappaTuneSelector(evaluator.model, show_progress=False).get_best_targets()
    ours = [paths[i] for i in sorted(scores, key=lambda i: -scores[i])]
    assert ours == [path for path in order if path in set(ours)]
    n = int(0.2 * len(paths))
    assert [paths[i] for i in result.placement.ids] == [p for p in paths.values() if p in ours[:n]]


def test_transposed_weights_have_the_same_condition_number(tmp_path: Path) -> None:
    result = KappaTune().search(make_problem(make_evaluator("gpt2", tmp_path), 1500))
    scores = result.history["rounds"][0]["saliency"]["kappatune"]
    assert len(scores) == 8
    assert all(0 < v < 1 for v in scores.values())


def test_explained_variance_gives_the_ranks_of_peft(tmp_path: Path) -> None:
    """At equal costs, on the same batches, with all directions wanted to converge."""
    evaluator = make_evaluator("llama", tmp_path, batch_size=8)
    problem = make_problem(evaluator, 28, "rank")  # 14 layers
    result = Eva().search(problem)
    sizes = {s.sites[0].path: n for s, n in result.placement.sizes.items()}
    batches: list[dict[str, Tensor]] = []
    seed = derive_seed(0, "calibration")
    plain = calibration.BasePasses(
        evaluator.model, evaluator.phases, evaluator.target, make_rows("llama"), 1, "", seed
    )
    plain.look(evaluator.model, lambda batch: batches.append(dict(batch)) or True)
    paths = [s.sites[0].path for s in problem.space]
    config = LoraConfig(r=2, target_modules=paths, eva_config=EvaConfig(rho=2.0, tau=0.99))
    found = get_eva_state_dict(evaluator.model, batches, config, show_progress_bar=False)
    theirs = {path: len(rows) for path, rows in found.items() if len(rows)}
    assert sum(theirs.values()) == sum(sizes.values()) == 28
    differ = sum(abs(theirs.get(p, 0) - sizes.get(p, 0)) for p in paths)
    assert differ <= 2  # they may stop at other batches


def test_explained_shares_are_those_of_an_eigendecomposition(tmp_path: Path) -> None:
    evaluator = make_evaluator("bert", tmp_path, batch_size=40)
    slots = low_rank_slots(make_problem(evaluator, 1))
    probe = ExplainedVariance(slots, n_directions=4, tau=1.0)
    found = evaluator.calibrate(probe, name="x", fidelity=Fidelity(), seed=0).tensors
    rows = make_rows("bert")
    batch = Collator(0)(list(rows))
    seen: dict[str, Tensor] = {}
    for slot in slots:
        path = slot.sites[0].path
        evaluator.model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.update({path: args[0].detach()})
        )
    evaluator.model(**batch)
    for slot in slots:
        x = seen[slot.sites[0].path][batch["attention_mask"].bool()].double()
        values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).flip(0)
        assert_close(found[slot.id], values[:4] / values.sum(), rtol=1e-2, atol=1e-3)


def test_too_few_tokens_for_the_directions_are_told(tmp_path: Path) -> None:
    evaluator = make_evaluator("bert", tmp_path, batch_size=1)
    slots = low_rank_slots(make_problem(evaluator, 1))
    probe = ExplainedVariance(slots, n_directions=12, tau=0.99)
    with pytest.raises(StateError, match=r"no batch has 12 tokens.*train.batch_size"):
        evaluator.calibrate(probe, name="x", fidelity=Fidelity(), seed=0)


def test_output_norms_by_hand(tmp_path: Path) -> None:
    """Without a step of learning rate 0 the modules keep values that are set before."""
    evaluator = make_evaluator("bert", tmp_path)
    slot = low_rank_slots(make_problem(evaluator, 1))[0]
    placement = SearchSpace((slot,)).full()
    net = attach(evaluator.model, placement, seed=1)
    passes = calibration.BasePasses(
        evaluator.model, evaluator.phases, evaluator.target, make_rows("bert"), 1, "", 0
    )
    layer = net.base_model.model.get_submodule(slot.sites[0].path)
    params = layer.params("default", "lora")
    params["B"].data.normal_()
    found = OutputNorms(placement, 1)._norms(net, passes)[slot.id]
    inputs: list[Tensor] = []
    hook = layer.base_layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    masks: list[Tensor] = []
    passes.look(net, lambda batch: masks.append(batch["attention_mask"].bool()) or True)
    hook.remove()
    x = torch.cat([i[m] for i, m in zip(inputs, masks, strict=True)])
    delta = 2 * x @ params["A"].T @ params["B"].T  # the scaling is 2
    assert float(found) == pytest.approx(float(delta.square().sum(1).mean()), rel=1e-4)
    detach(net)


def test_adalora_masks_ranks_down_to_the_target(tmp_path: Path) -> None:
    evaluator = make_evaluator("bert", tmp_path)
    problem = make_problem(evaluator, 24, "rank")  # 12 layers, so 2 each and 3 at first
    ranks = AdaLora().search(problem).history["rounds"][0]["saliency"]["adalora"]
    assert sum(ranks.values()) == pytest.approx(24, abs=1)
    assert max(ranks.values()) <= 3
    assert len(set(ranks.values())) > 1


# --- settings ------------------------------------------------------------------------------


def config(**given: Any) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "budget": "1%"} | given)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_settings_reach_the_method_that_reads_them_and_no_other(method: Allocator) -> None:
    values = {
        "batches": 3,
        "max_factor": 3.0,
        "min_factor": 0.25,
        "warm_head": False,
        "tau": 0.5,
        "keep": 0.75,
    }
    assert set(values) == set(AllocateSettings.model_fields)
    own = {f.name for f in fields(method)}
    for name, value in values.items():
        given = config(method=method.name, allocate={name: value})
        if name in own:
            assert make_strategy(given) == replace(method, **{name: value})
        else:
            with pytest.raises(ConfigError, match=f"does not read allocate.{name}"):
                make_strategy(given)
    assert make_strategy(config(method=method.name)) == method
    assert METHODS.get(method.name) is type(method)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Eva(tau=2.0), "allocate.tau"),
        (lambda: Fisher(max_factor=0.5), "allocate.max_factor"),
        (lambda: GoRa(min_factor=-1.0), "allocate.min_factor"),
        (lambda: Fisher(batches=0), "allocate.batches"),
        (lambda: LoraDrop(keep=0.0), "allocate.keep"),
    ],
    ids="tau max_factor min_factor batches keep".split(),
)
def test_settings_that_cannot_be_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_only_so_many_batches_are_looked_at(tmp_path: Path) -> None:
    result = Fisher(batches=2, warm_head=False).search(
        make_problem(make_evaluator("gpt2", tmp_path), 1500)
    )
    assert result.steps == 2
    assert result.history["rounds"][0]["rows"] == 16


def test_a_fixed_share_of_modules_uses_the_budget_up(tmp_path: Path) -> None:
    problem = make_problem(make_evaluator("bert", tmp_path), 1500)
    few, many = (KappaTune(keep=k).search(problem).placement for k in (0.25, 0.75))
    assert (len(few), len(many)) == (3, 9)
    assert cost(few, "parameters") > 1500 - 48
    assert min(few.sizes.values()) > max(many.sizes.values())
    problem = replace(problem, limit=6, unit="modules")
    counts = {k: len(KappaTune(keep=k).search(problem).placement) for k in (0.25, 0.75, None)}
    assert counts == {0.25: 3, 0.75: 6, None: 6}


def test_a_weight_of_zeros_has_no_condition_and_goes_first(tmp_path: Path) -> None:
    problem = make_problem(make_evaluator("bert", tmp_path), 11, "modules")
    slot = problem.space.slots[3]
    model = problem.evaluator.model
    torch.nn.init.zeros_(model.get_submodule(slot.sites[0].path).weight)
    assert slot.id not in KappaTune().search(problem).placement.ids
