"""Light-PEFT: exact counts, the budget on the cut base, and what is carried over to it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import RunConfig
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.estimates import _search_cost
from prunepeft.kinds import n_params, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement
from prunepeft.strategies import METHODS, HybridPruning, LightPeft, Problem
from prunepeft.strategies.make import make_strategy
from prunepeft.structured import Masks, apply_cut, choose_units, find_groups
from prunepeft.structured.keep import fit, keep_modules, keep_ranks, n_gone, slots_after
from prunepeft.supernet import (
    attach,
    detach,
    load_trainable_state,
    placement_of,
    remove_slots,
    shrink_slot,
    slot_parameters,
    trainable_state,
)
from tests.tiny_models import TINY, make_tiny, tiny_inputs

WHOLE = {"head_ratio": 0.0, "neuron_ratio": 0.0}


# --- counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
def test_exact_numbers_of_modules_and_ranks(constant: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.ones(144) if constant else torch.randperm(144, generator=draw).float()
    modules = {f"m{i}": v.item() for i, v in enumerate(values)}
    kept = keep_modules(modules, 0.75)
    assert len(kept) == 36
    assert min(modules[i] for i in kept) >= 108 or constant
    scores = {i: torch.ones(8) if constant else torch.rand(8, generator=draw) for i in kept}
    for scope in ("layer", "global"):
        ranks = keep_ranks(scores, 0.5, scope)
        assert sum(map(len, ranks.values())) == 144
        assert all(r == sorted(set(r)) for r in ranks.values())
        assert scope == "global" or all(len(r) == 4 for r in ranks.values())


def test_equal_scores_go_in_order() -> None:
    assert keep_modules(dict.fromkeys("abcd", 1.0), 0.5) == ["c", "d"]
    equal = {"a": torch.ones(2), "b": torch.ones(2)}
    assert keep_ranks(equal, 0.5, "global") == {"b": [0, 1]}
    assert keep_ranks(equal, 0.5, "layer") == {"a": [1], "b": [1]}


def test_ranks_by_hand() -> None:
    scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([0.5, 0.7])}
    assert keep_ranks(scores, 0.5, "global") == {"a": [0, 1]}
    assert keep_ranks(scores, 0.5, "layer") == {"a": [1], "b": [1]}
    assert keep_ranks({"a": torch.ones(1)}, 0.5, "layer") == {"a": [0]}
    assert keep_ranks({}, 0.5) == {}


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 50), ratio=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_any_number_of_modules(n: int, ratio: float, seed: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    modules = {str(i): v.item() for i, v in enumerate(values)}
    kept = keep_modules(modules, ratio)
    assert len(kept) == n - n_gone(n, ratio)
    assert not n or kept
    gone = [v for i, v in modules.items() if i not in kept]
    assert not gone or max(gone) <= min(modules[i] for i in kept)


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(5, 200), seed=st.integers(0, 99))
def test_fitting_takes_the_lowest_ranks_and_no_more_than_needed(limit: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    modules = {i: torch.rand(1, generator=draw).item() for i in "abcd"}
    ranks = {i: torch.rand(4, generator=draw) for i in "abc"}
    each = {"a": 5, "b": 10, "c": 3, "d": 4}
    keep = {i: list(range(4 if i in ranks else 1)) for i in "abcd"}
    kept = fit(keep, modules, ranks, lambda i, n: each[i] * n, limit)
    total = sum(each[i] * len(r) for i, r in kept.items())
    assert total <= limit
    gone = [
        (ranks[i][k].item(), each[i]) for i in "abc" for k in keep[i] if k not in kept.get(i, [])
    ]
    if gone and "d" in kept:
        assert total + max(gone)[1] > limit
        left = [ranks[i][k].item() for i in "abc" for k in kept.get(i, [])]
        assert max(gone)[0] <= min(left, default=9)


def test_fitting_by_modules_takes_modules() -> None:
    ranks = {i: torch.ones(2) for i in "abc"}
    keep = {i: [0, 1] for i in "abc"}
    scores = {"a": 2.0, "b": 1.0, "c": 3.0}
    assert fit(keep, scores, ranks, lambda i, n: 1 if n else 0, 2) == {"a": [0, 1], "c": [0, 1]}
    with pytest.raises(BudgetError, match="no module fits"):
        fit(keep, scores, ranks, lambda i, n: 9 * n, 8)


@pytest.mark.parametrize("name", tuple(TINY))
def test_slots_after_the_cut_are_those_of_the_cut_model(name: str) -> None:
    model = TINY[name]()
    groups = find_groups(model)
    space = make_space(find_sites(model), ["lora", "serial_adapter"])
    draw = torch.Generator().manual_seed(0)
    scores = {g.id: torch.rand(g.n_units, generator=draw) for g in groups}
    cut = choose_units(groups, scores, {"heads": 0.5, "neurons": 0.4})
    slots = slots_after(space.full(), groups, cut)
    apply_cut(model, groups, cut)
    now = {s.path: (s.d_in, s.d_out) for s in find_sites(model)}
    assert list(slots) == [s.id for s in space]
    for slot in slots.values():
        assert [(s.d_in, s.d_out) for s in slot.sites] == [now[s.path] for s in slot.sites]


def test_a_layer_without_neurons_carries_nothing() -> None:
    model = make_tiny("bert")
    groups = [g for g in find_groups(model) if g.what == "neurons"]
    scores = {g.id: torch.full((32,), float(i)) for i, g in enumerate(groups)}
    cut = choose_units(groups, scores, {"neurons": 0.5}, {"neurons": "global"})
    slots = slots_after(make_space(find_sites(model), ["lora"]).full(), groups, cut)
    assert not any("encoder.0.ffn" in i for i in slots)
    assert any("encoder.1.ffn" in i for i in slots)


# --- the method on a real small model ------------------------------------------------------


class SmallEvaluator:
    """Trains a tiny model for a few steps; what is carried over stays on the cut model."""

    def __init__(self, name: str = "bert", pieces: int = 1, n_steps: int = 4) -> None:
        self.model = TINY[name]()
        self.groups = find_groups(self.model)
        self.batch = tiny_inputs(name, self.model, batch=4)
        self.pieces, self.n_steps = pieces, n_steps
        self.calls: list[dict] = []

    def watch(self, placement: Placement, watcher, **call) -> SimpleNamespace:
        self.calls.append(call | {"config": json.loads(json.dumps(watcher.config))})
        net = attach(self.model, placement, seed=call["init_seed"]).train()
        for slot_id, parameters in slot_parameters(net).items():
            for path, p in parameters.items():
                p.data += 0.1 * torch.randn(p.shape, generator=seeded(2, slot_id, path))
        watcher.attach(net)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3)
        watcher.start(self.n_steps)
        for _ in range(self.n_steps):
            for k in range(self.pieces):
                part = {n: t[k :: self.pieces] for n, t in self.batch.items()}
                net(**part).logits.square().sum().backward()
            watcher.step()
            optimizer.step()
            optimizer.zero_grad()
        tensors = watcher.stop()
        self.trained = trainable_state(net)
        self.logits = net.eval()(**self.batch).logits.detach()
        detach(net)
        cost = {"seconds": 2.0, "steps": self.n_steps, "rows": 4, "peak_memory_bytes": 1}
        return SimpleNamespace(tensors=tensors, key="trained", loss=1.0, **cost)

    def carry(self, placement: Placement, key: str, cut, keep_ranks) -> tuple[Placement, str]:
        assert key == "trained"
        net = attach(self.model, placement)
        load_trainable_state(net, self.trained)
        remove_slots(net, [i for i in placement.ids if i not in keep_ranks])
        for slot_id, ranks in keep_ranks.items():
            shrink_slot(net, slot_id, torch.tensor(ranks))
        self.uncut = None
        if cut is not None:
            masks = Masks(net, self.groups)
            masks.show(cut)
            self.uncut = net.eval()(**self.batch).logits.detach()
            masks.remove()
            apply_cut(net, self.groups, cut)
        self.net = net.eval()
        return placement_of(net), "carried"


def make_problem(evaluator, share=0.4, unit="parameters", kinds=("lora",), groups=True) -> Problem:
    space = make_space(find_sites(evaluator.model), list(kinds), sizes={"lora": 4})
    problem = Problem(space, 1, unit, evaluator, 100, Fidelity(0.5, 2), seed=3)
    limit = int(problem.cost(space.full()) * share)
    found = evaluator.groups if groups else ()
    return Problem(space, limit, unit, evaluator, 100, Fidelity(0.5, 2), seed=3, groups=found)


def run(strategy: LightPeft, name: str = "bert", pieces: int = 1, **asked):
    evaluator = SmallEvaluator(name, pieces)
    problem = make_problem(evaluator, **asked)
    return strategy.search(problem), problem, evaluator


@pytest.mark.parametrize("unit", ["parameters", "modules", "rank"])
@pytest.mark.parametrize("share", [0.15, 0.4, 2.0])
def test_the_best_modules_that_fit_stay(unit: str, share: float) -> None:
    result, problem, evaluator = run(LightPeft(), share=share, unit=unit)
    assert 0 < problem.cost(result.placement) <= problem.limit
    assert result.start == "carried"
    assert (result.runs, result.steps) == (1, 4)
    (call,) = evaluator.calls
    assert call["fidelity"] == Fidelity(0.5, 2)
    history = json.loads(json.dumps(result.history))
    (entry,) = history["rounds"]
    assert entry["cost_after"] == problem.cost(result.placement)
    assert set(entry["removed"]) == set(problem.space.full().ids) - set(result.placement.ids)
    for group in history["base"]:
        gone = {"heads": 1, "neurons": 11}[group["what"]]
        assert group["n_kept"] == group["n_units"] - gone
    if share == 2.0:  # everything fits: only the ratios cut
        assert sum(result.placement.sizes.values()) == 2 * len(problem.space)


def test_a_cut_base_leaves_room_for_more_modules() -> None:
    """The limit counts modules where they are, and those on the cut base are smaller."""
    strategy = {"rank_ratio": 0.0, "rank_scope": "layer"}
    small, *_ = run(LightPeft(head_ratio=0.75, neuron_ratio=0.75, **strategy), share=0.7)
    whole, *_ = run(LightPeft(**WHOLE, **strategy), share=0.7)
    assert len(small.placement) > len(whole.placement)


def test_given_ratios_hold_if_the_budget_allows() -> None:
    result, problem, _ = run(LightPeft(module_ratio=0.5, rank_ratio=0.25), share=1.0)
    n = len(problem.space)
    kept = result.history["kept_ranks"]
    stay = n - n_gone(n, 0.5)
    assert sum(map(len, kept.values())) == 4 * stay - n_gone(4 * stay, 0.25)
    assert result.history["note"] == ""
    scores = result.history["rounds"][0]["saliency"]["relative_change"]
    best = sorted(scores, key=lambda i: -scores[i])[:stay]
    assert set(kept) <= set(best)


def test_ranks_go_on_to_go_until_the_budget_is_met() -> None:
    result, problem, _ = run(LightPeft(module_ratio=0.0, rank_ratio=0.0), share=0.3)
    assert 0 < problem.cost(result.placement) <= problem.limit
    assert "more ranks went to meet the budget" in result.history["note"]
    kept, scores = result.history["kept_ranks"], result.history["ranks"]
    left = [scores[i][k] for i, ranks in kept.items() for k in ranks]
    gone = [s for i in scores for k, s in enumerate(scores[i]) if k not in kept.get(i, [])]
    assert max(gone) <= min(left)


def test_without_groups_and_without_modules() -> None:
    modules, _, evaluator = run(LightPeft(), groups=False)
    assert modules.cut is None
    assert modules.history["base"] == []
    assert evaluator.calls[0]["config"]["groups"] == []
    base, problem, evaluator = run(LightPeft(module_ratio=0.0, rank_ratio=0.0), share=1.0)
    assert base.placement.ids == problem.space.full().ids
    assert base.history["ranks"] == {}
    config = evaluator.calls[0]["config"]
    assert config["groups"]
    assert not config["modules"] | config["ranks"]
    heads, *_ = run(LightPeft(neuron_ratio=0.0))
    assert {g["what"] for g in heads.history["base"]} == {"heads"}


def test_a_kind_that_cannot_follow_the_cut_is_refused_before_training() -> None:
    problem = make_problem(SmallEvaluator("bert", 1))
    roles = {"serial_adapter": [["up"]]}
    slots = make_space(find_sites(TINY["bert"]()), ("serial_adapter",), roles=roles)
    with pytest.raises(ConfigError, match=r"intermediate.*o,down"):
        LightPeft().check(replace(problem, space=slots, limit=9000))
    LightPeft(neuron_ratio=0).check(replace(problem, space=slots, limit=9000))


def test_a_ratio_the_base_cannot_have_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="nearest"):
        run(LightPeft(head_ratio=0.3), name="llama")  # 4 heads over 2 pairs of keys and values
    result, problem, _ = run(LightPeft(head_ratio=0.5), name="llama")
    assert problem.cost(result.placement) <= problem.limit
    assert all(g["n_kept"] == 1 for g in result.history["base"] if g["what"] == "heads")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_what_is_carried_is_the_masked_model(name: str) -> None:
    _, _, evaluator = run(LightPeft(head_ratio=0.5), name=name)
    after = evaluator.net(**evaluator.batch).logits
    assert_close(after, evaluator.uncut, rtol=1e-4, atol=1e-5)


def test_with_all_ratios_zero_nothing_changes() -> None:
    before = TINY["bert"]().state_dict()
    none = LightPeft(**WHOLE, module_ratio=0.0, rank_ratio=0.0)
    result, _, evaluator = run(none, share=1.0)
    assert result.cut is None
    assert torch.equal(evaluator.net(**evaluator.batch).logits, evaluator.logits)
    assert all(torch.equal(t, before[n]) for n, t in detach(evaluator.net).state_dict().items())


def test_ranks_cut_keep_the_old_scaling() -> None:
    result, problem, evaluator = run(LightPeft(**WHOLE, module_ratio=0.0), share=1.0)
    own = slot_parameters(evaluator.net)
    for slot in result.placement:
        kept = result.history["kept_ranks"][slot.id]
        path = slot.sites[0].path
        at = f"base_model.model.{path}.union_lora_"
        a, b = (evaluator.trained[f"{at}{x}.default"] for x in "AB")
        layer = evaluator.net.base_model.model.get_submodule(path)
        s = layer.branches["default"]["lora"].scaling
        assert s == 2.0  # alpha / r of the slot's largest size
        left = s * own[slot.id][f"{path}.B"] @ own[slot.id][f"{path}.A"]
        assert_close(left, s * b[:, kept] @ a[kept])
    assert result.placement.sizes != problem.space.full().sizes


def test_same_seed_and_any_micro_batches_give_the_same_choice() -> None:
    found = [run(LightPeft(), pieces=pieces)[0] for pieces in (1, 1, 2)]
    assert found[0].history == found[1].history
    for other in found[1:]:
        assert other.cut == found[0].cut
        assert other.history["kept_ranks"] == found[0].history["kept_ranks"]


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_ratio", 1.0),
        ("module_ratio", -0.1),
        ("neuron_scope", "row"),
        ("rank_importance", "first"),
    ],
)
def test_wrong_settings_name_what_is_allowed(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"light_peft.{field}"):
        LightPeft(**{field: value})


def config(**settings: object) -> RunConfig:
    return RunConfig(model="m", data="d", budget="1%", **settings)


def test_each_method_gets_its_own_section() -> None:
    light = make_strategy(config(method="light-peft", light_peft={"module_ratio": "0.75"}))
    assert light == LightPeft(module_ratio=0.75)
    hybrid = make_strategy(config(search={"rounds": 2, "criteria": "snip"}))
    assert hybrid == HybridPruning(rounds=2, criteria=("snip",))
    assert make_strategy(config(method="light-peft")) == LightPeft()
    assert make_strategy(config()) == HybridPruning()


def test_no_setting_of_a_section_is_ignored() -> None:
    of_all = {"fidelity", "epochs", "lr"}  # read by whoever trains
    read: dict[str, set[str]] = {}
    for _, method in METHODS:  # methods of one family share a section
        read.setdefault(method.section, set()).update(method.__dataclass_fields__)
    for name, fields in read.items():
        assert set(type(getattr(config(), name)).model_fields) - of_all <= fields, name


def test_criteria_of_partitions_say_nothing_here(tmp_path) -> None:
    file = tmp_path / "strategy.json"
    file.write_text('{"strategy": {}}')
    with pytest.raises(ConfigError, match="leave strategy out"):
        make_strategy(config(method="light-peft", strategy=str(file)))


def test_the_estimate_is_one_training() -> None:
    settings = config(method="light-peft", search={"epochs": 2})
    rows = SimpleNamespace(train=range(160), n_classes=1)
    asked = {"space": None, "limit": 1, "groups": (), "metric": "accuracy"}
    asked |= {"given": None, "budget": SimpleNamespace(unit="parameters")}
    plan = SimpleNamespace(config=settings, strategy=make_strategy(settings), splits=rows, **asked)
    assert _search_cost(plan) == {"runs": 1, "steps": 20, "rows_per_training_row": 0.667}


def test_costs_of_slots_after_the_cut() -> None:
    """Heads: rows of q's B go, so LoRA there costs r times the features less."""
    model = make_tiny("bert")
    groups = find_groups(model)
    space = make_space(find_sites(model), ["lora"], roles={"lora": [["q"]]}, sizes={"lora": 4})
    scores = {g.id: torch.arange(g.n_units).float() for g in groups}
    cut = choose_units(groups, scores, {"heads": 0.25})
    before, after = space.slots[0], slots_after(space.full(), groups, cut)[space.slots[0].id]
    assert n_params(before, 4) - n_params(after, 4) == 4 * 4
