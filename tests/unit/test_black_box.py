"""Black-box search on mock objectives: budget, seeds, failures, rungs, ages, and what it finds."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.budget import Fidelity
from prunepeft.config import load_config
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.evaluate import Tried
from prunepeft.kinds import cost, slot_cost
from prunepeft.space import Placement, SearchSpace, Site, Slot
from prunepeft.strategies import BlackBox, Evolution, Problem, RandomSearch, SuccessiveHalving
from prunepeft.strategies.choices import Choices
from prunepeft.strategies.evolution import mutate
from prunepeft.strategies.history import History, Trial
from prunepeft.strategies.make import make_strategy

METHODS = (RandomSearch, SuccessiveHalving, Evolution)
UNITS = ("parameters", "modules", "rank")


def make_space(n_layers: int = 6, sizes: tuple[int, ...] = (2, 4, 8), d: int = 16) -> SearchSpace:
    slots = []
    for layer in range(n_layers):
        sites = [
            Site(f"l.{layer}.{r}", "encoder", layer, n_layers, "attention", r, d, d) for r in "qv"
        ]
        down = Site(
            f"l.{layer}.down", "encoder", layer, n_layers, "ffn", "down", 4 * d, d, f"l.{layer}.up"
        )
        slots.append(Slot(tuple(sites), "lora", sizes))
        slots.append(Slot((down,), "serial_adapter", sizes))
    return SearchSpace(tuple(slots))


class MockEvaluator:
    """Planted useful slots, sizes that saturate, and noise that a low fidelity makes larger."""

    def __init__(self, useful: set[str] = frozenset(), noise: float = 0.0, fails=()) -> None:
        self.useful, self.noise, self.fails = useful, noise, set(fails)
        self.calls: list[tuple[Fidelity, int]] = []

    def truth(self, placement: Placement) -> float:
        return sum(1 - math.exp(-n / 3) for s, n in placement.sizes.items() if s.id in self.useful)

    def trial(self, placement, *, name, fidelity, seed) -> Tried:
        self.calls.append((fidelity, seed))
        steps = round(100 * fidelity.data) * fidelity.epochs
        if len(self.calls) in self.fails:
            return Tried(error="StateError: the training loss became nan", steps=steps)
        sizes = sorted((s.id, n) for s, n in placement.sizes.items())
        draw = random.Random(f"{sizes}{fidelity}{seed}").gauss(0, self.noise)
        value = self.truth(placement) + draw / math.sqrt(fidelity.data)
        return Tried({"accuracy": value}, key=name, seconds=1.0, steps=steps)


def make_problem(space=None, limit=None, evaluator=None, unit="parameters", seed=0) -> Problem:
    space = make_space() if space is None else space
    limit = cost(space.full(), unit) // 3 if limit is None else limit
    evaluator = evaluator or MockEvaluator({s.id for s in space if s.layer % 2})
    problem = Problem(space, limit, unit, evaluator, 1000, Fidelity(), seed)
    return replace(problem, metric="accuracy", batch_size=10)


def sizes_of(result) -> list[dict[str, int]]:
    return [t["sizes"] for t in result.history["trials"]]


# --- budget ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    share=st.floats(0.01, 0.99),
    sizes=st.sets(st.integers(1, 20), min_size=1, max_size=4),
    layers=st.integers(1, 6),
    unit=st.sampled_from(UNITS),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 100),
)
def test_every_proposal_is_within_the_budget_and_uses_it_up(
    share, sizes, layers, unit, method, seed
):
    space = make_space(layers, tuple(sorted(sizes)))
    limit = int(cost(space.full(), unit) * share)
    problem = make_problem(space, limit, unit=unit, seed=seed)
    strategy = method(n_trials=15)
    if min(slot_cost(s, s.sizes[0], unit) for s in space) > limit:
        with pytest.raises(BudgetError, match="smallest module"):
            strategy.search(problem)
        return
    result = strategy.search(problem)
    by_id = space.by_id()
    first = [t for t in result.history["trials"] if t["stage"] == 0]
    for trial in first:
        placement = Placement({by_id[i]: n for i, n in trial["sizes"].items()})
        assert 0 < len(placement)
        assert trial["cost"] == cost(placement, unit) <= limit
        if method is Evolution:
            continue  # the slot that was changed stays as it is
        for slot in space:
            now = slot_cost(slot, placement.sizes[slot], unit) if slot in placement else 0
            more = [slot_cost(slot, n, unit) - now for n in slot.sizes]
            assert all(trial["cost"] + extra > limit for extra in more if extra > 0)
    assert len({t["placement"] for t in first}) == len(first)
    assert cost(result.placement, unit) <= limit


@settings(max_examples=200, deadline=None)
@given(share=st.floats(0.05, 0.9), unit=st.sampled_from(UNITS), seed=st.integers(0, 1000))
def test_a_change_is_within_the_budget_and_changes_its_slot(share, unit, seed):
    space = make_space()
    limit = max(int(cost(space.full(), unit) * share), 200 if unit == "parameters" else 2)
    choices = Choices.of(space, limit, unit)
    draw = torch.Generator().manual_seed(seed)
    vector = choices.draw(draw)
    child = mutate(choices, vector, draw)
    assert child != vector
    assert choices.cost(child) == cost(choices.decode(child), unit) <= limit
    assert choices.encode(choices.decode(child)) == child


def test_a_full_cut_by_hand():
    slots = make_space(2, (1, 2)).slots
    choices = Choices(slots, ((0, 3, 5), (0, 2, 4), (0, 3, 5), (0, 2, 4)), 7)
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        cut = choices.repair((2, 2, 2, 2), draw, fixed=0)
        assert cut in {(2, 1, 0, 0), (2, 0, 0, 1)}  # 5 of 7 are taken; only a 2 fits beside it
        assert choices.repair((0, 0, 0, 0), draw) != (0, 0, 0, 0)


def test_where_sizes_are_free_they_stay_as_drawn():
    problem = make_problem(unit="modules")
    found = {n for sizes in sizes_of(RandomSearch().search(problem)) for n in sizes.values()}
    assert found == {2, 4, 8}


def test_a_budget_above_all_candidates_tries_nothing():
    problem = make_problem(limit=10**9)
    result = RandomSearch().search(problem)
    assert result.placement == problem.space.full()
    assert problem.evaluator.calls == result.history["trials"] == []


def test_a_small_space_ends_without_duplicates():
    problem = make_problem(make_space(1, (4,)), 1, unit="modules")
    for method in METHODS:
        result = method().search(problem)
        first = [t["sizes"] for t in result.history["trials"] if t["stage"] == 0]
        assert sorted(map(str, first)) == [
            "{'encoder.0.attention.q+v:lora': 4}",
            "{'encoder.0.ffn.down:serial_adapter': 4}",
        ]


def test_a_proposal_over_the_budget_is_refused():
    class Greedy(RandomSearch):
        def propose(self, history, n, generator):
            return [SearchSpace(history.choices.slots).full()]

    with pytest.raises(BudgetError, match="within the budget of"):
        Greedy().search(make_problem())


# --- the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_search_and_history_is_json(method):
    first, second = (method().search(make_problem(seed=3)) for _ in range(2))
    other = method().search(make_problem(seed=4))
    assert json.loads(json.dumps(first.history)) == second.history
    assert sizes_of(first) == sizes_of(second) != sizes_of(other)
    assert first.placement == second.placement
    assert first.runs == len(first.history["trials"])
    assert first.runs < first.seconds < first.runs + 60  # a second a trial, and what proposing took
    assert len({seed for _, seed in make_calls(method)}) == 1


def make_calls(method) -> list:
    problem = make_problem()
    method(n_trials=12).search(problem)
    return problem.evaluator.calls


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_trial_is_recorded_and_the_search_goes_on(method):
    evaluator = MockEvaluator({"encoder.0.attention.q+v:lora"}, fails=(2, 5))
    result = method(n_trials=16).search(make_problem(evaluator=evaluator))
    failed = [t for t in result.history["trials"] if t["status"] == "failed"]
    assert [t["number"] for t in failed] == [2, 5]
    assert failed[0]["metric"] is None
    assert failed[0]["error"] == "StateError: the training loss became nan"
    assert sum(t["stage"] == 0 for t in result.history["trials"]) == 16
    assert result.history["best"] not in (2, 5)


def test_if_all_fail_the_search_fails():
    evaluator = MockEvaluator(fails=range(100))
    with pytest.raises(StateError, match="all 4 trials failed; the last one with: StateError"):
        RandomSearch(n_trials=4).search(make_problem(evaluator=evaluator))


def test_a_method_that_proposes_nothing_is_told():
    class Silent(RandomSearch):
        name = "silent"

        def propose(self, history, n, generator):
            return []

    with pytest.raises(StateError, match="method silent proposed no placement"):
        Silent().search(make_problem())


def test_an_error_that_is_raised_is_not_swallowed():
    class Broken(MockEvaluator):
        def trial(self, placement, **kwargs):
            raise BudgetError("over the budget")

    with pytest.raises(BudgetError, match="over the budget"):
        RandomSearch().search(make_problem(evaluator=Broken()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_steps", [100, 250, 999])
def test_steps_bound_the_search(method, max_steps):
    result = method(max_steps=max_steps).search(make_problem())
    assert max_steps / 3 <= result.steps <= max_steps
    assert method is SuccessiveHalving or result.steps > max_steps - 100
    assert sum(t["steps"] for t in result.history["trials"]) == result.steps


def trial(number, metric, cost_, space, stage=0):
    placement = Placement({space.slots[0]: number})
    return Trial(number, stage, placement, (number,), cost_, Fidelity(), metric)


def test_best_and_front_by_hand():
    space = make_space()
    values = ((0.8, 9), (0.9, 9), (0.9, 7), (0.7, 4), (0.7, 5), (None, 1), (0.9, 7), (0.6, 4))
    trials = tuple(trial(i, m, c, space) for i, (m, c) in enumerate(values, 1))
    choices = Choices.of(space, 10, "rank")
    history = History(choices, trials=trials)
    assert [t.number for t in history.judged()] == [3, 7, 2, 1, 4, 5, 8]
    assert [t.number for t in history.front()] == [3, 4]
    lower = replace(history, greater_is_better=False)
    assert [t.number for t in lower.front()] == [8]
    again = replace(history, trials=(*trials, trial(8, 0.1, 9, space, stage=1)))
    assert [t.number for t in again.judged()] == [8]
    failed = replace(history, trials=(*trials, trial(8, None, 9, space, stage=1)))
    assert failed.judged() == history.judged()


# --- successive halving -------------------------------------------------------------------------


def test_rungs_by_hand():
    assert SuccessiveHalving(n_trials=9).stages(make_problem()) == (
        (9, Fidelity(1 / 9)),
        (3, Fidelity(1 / 3)),
        (1, Fidelity(1.0)),
    )
    counts = {8: [8, 2], 10: [10, 3, 1], 30: [30, 10, 3, 1], 2: [2]}
    for n, expected in counts.items():
        assert [k for k, _ in SuccessiveHalving(n_trials=n).stages(make_problem())] == expected
    halves = SuccessiveHalving(n_trials=8, eta=2, fidelity=0.8, epochs=2).stages(make_problem())
    assert [k for k, _ in halves] == [8, 4, 2, 1]
    assert halves[1] == (4, Fidelity(0.2, 2))


def test_a_rung_has_a_full_batch_and_the_bracket_is_paid_for():
    few = replace(make_problem(), n_train=60)
    assert SuccessiveHalving(n_trials=27).stages(few) == ((27, Fidelity(1 / 3)), (9, Fidelity(1.0)))
    # 9, 3 and 1 take 99 + 99 + 100 steps; 8 and 2 take 264 + 200
    assert [k for k, _ in SuccessiveHalving(max_steps=300).stages(make_problem())] == [9, 3, 1]


def test_rungs_of_many_classes_have_a_row_of_each():
    """Fewer rows than classes are not taken, so rungs of fewer would not differ."""
    many = replace(make_problem(), n_classes=77)
    rungs = SuccessiveHalving(n_trials=27).stages(many)
    rows = [many.rows(fidelity) for _, fidelity in rungs]
    assert min(rows) >= 77
    assert len(set(rows)) == len(rows)
    assert many.rows(Fidelity(0.001)) == 77
    assert many.n_steps(Fidelity(0.001)) == 77 // many.batch_size


def test_promotions_are_the_best_cheaper_before_dearer_then_earlier():
    result = SuccessiveHalving(n_trials=9).search(make_problem())
    rungs = [[t for t in result.history["trials"] if t["stage"] == k] for k in range(3)]
    assert [len(r) for r in rungs] == [9, 3, 1]
    ranked = sorted(rungs[0], key=lambda t: (-t["metric"], t["cost"], t["number"]))
    assert [t["placement"] for t in rungs[1]] == [t["placement"] for t in ranked[:3]]
    constant = SuccessiveHalving(n_trials=9).search(make_problem(evaluator=MockEvaluator()))
    trials = constant.history["trials"]
    ties = sorted(trials[:9], key=lambda t: (t["cost"], t["number"]))
    assert [t["placement"] for t in trials[9:12]] == [t["placement"] for t in ties[:3]]
    assert trials[12]["placement"] == ties[0]["placement"] == constant.placement.digest


def test_a_rung_that_failed_promotes_what_is_left():
    evaluator = MockEvaluator({"encoder.0.attention.q+v:lora"}, fails=range(1, 9))
    result = SuccessiveHalving(n_trials=9).search(make_problem(evaluator=evaluator))
    assert [t["stage"] for t in result.history["trials"]] == [0] * 9 + [1, 2]


# --- evolution ----------------------------------------------------------------------------------


def test_the_oldest_dies_however_good():
    space = make_space()
    choices = Choices.of(space, 100, "rank")
    metrics = (0.9, 0.1, None, 0.2, 0.3, 0.4)
    trials = tuple(trial(i, m, 1, space) for i, m in enumerate(metrics, 1))
    ages = Evolution(population=3)
    for n, expected in ((3, [1, 2]), (4, [1, 2, 4]), (5, [2, 4, 5]), (6, [4, 5, 6])):
        alive = ages.alive(History(choices, trials=trials[:n]))
        assert [t.number for t in alive] == expected


def test_a_child_is_one_change_of_the_best_of_the_sample():
    problem = make_problem(unit="modules")
    strategy = Evolution(n_trials=9, population=8, sample=400)  # a sample holds every member
    trials = strategy.search(problem).history["trials"]
    parent = max(trials[:8], key=lambda t: (t["metric"], -t["number"]))
    before, after = parent["sizes"], trials[8]["sizes"]
    changed = [i for i in before.keys() | after.keys() if before.get(i) != after.get(i)]
    assert len(changed) <= 2  # the slot, and another one for which it makes room


# --- what it finds ------------------------------------------------------------------------------


def found(strategy: BlackBox, seed: int) -> float:
    space = make_space(12)
    useful = set(random.Random(0).sample([s.id for s in space], 8))
    evaluator = MockEvaluator(useful, noise=0.1)
    problem = replace(make_problem(space, evaluator=evaluator, seed=seed), batch_size=30)
    return evaluator.truth(strategy.search(problem).placement)


@pytest.mark.parametrize(("method", "max_steps"), [(Evolution, 8100), (SuccessiveHalving, 2700)])
def test_evolution_and_asha_beat_the_median_of_random_at_equal_steps(method, max_steps):
    given = {"n_trials": 200, "max_steps": max_steps}
    median = statistics.median(found(RandomSearch(**given), seed) for seed in range(10))
    assert sum(found(method(**given), seed) > median for seed in range(10)) >= 8


@pytest.mark.parametrize(
    ("method", "wrong", "match"),
    [
        (RandomSearch, {"n_trials": 0}, "black_box.n_trials must be 1"),
        (RandomSearch, {"max_steps": 0}, "black_box.max_steps must be 1"),
        (RandomSearch, {"fidelity": 0.0}, "fidelity must be in"),
        (SuccessiveHalving, {"eta": 1}, "black_box.eta must be 2"),
        (Evolution, {"population": 1}, "black_box.population must be 2"),
        (Evolution, {"sample": 0}, "black_box.sample must be 1"),
    ],
)
def test_wrong_settings(method, wrong, match):
    with pytest.raises((ConfigError, BudgetError), match=match):
        method(**wrong)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_steps_for_one_trial(method):
    with pytest.raises(ConfigError, match="less than the 100 steps of one trial"):
        method(max_steps=99).search(make_problem())


def test_settings_reach_their_method():
    given = {"model": "m", "data": "d", "budget": "1%", "method": "asha"}
    config = load_config(None, ("black_box.eta=2", "black_box.n_trials=8"), given)
    assert make_strategy(config) == SuccessiveHalving(n_trials=8, eta=2)
    other = load_config(None, ("black_box.population=5",), given | {"method": "evolution"})
    assert make_strategy(other) == Evolution(population=5)
    assert make_strategy(load_config(None, (), given | {"method": "random"})) == RandomSearch()
