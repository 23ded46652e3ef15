"""PrunePEFT's loop on a mock evaluator: sharing, budget, modes, re-initialisation, replay."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.budget import Fidelity
from prunepeft.criteria import PAPER_CRITERIA
from prunepeft.errors import BudgetError, ConfigError, UnknownNameError
from prunepeft.evaluate import Scored
from prunepeft.kinds import cost, slot_cost
from prunepeft.space import Placement, SearchSpace, Site, Slot
from prunepeft.strategies import HybridPruning, Problem


def make_space(n_layers: int = 6, rank: int = 8, width: int = 16, d: int = 16) -> SearchSpace:
    slots = []
    for layer in range(n_layers):
        sites = [
            Site(f"l.{layer}.{r}", "encoder", layer, n_layers, "attention", r, d, d) for r in "qv"
        ]
        down = Site(
            f"l.{layer}.down", "encoder", layer, n_layers, "ffn", "down", 4 * d, d, f"l.{layer}.up"
        )
        slots.append(Slot(tuple(sites), "lora", (rank,)))
        slots.append(Slot((down,), "serial_adapter", (width,)))
    return SearchSpace(tuple(slots))


class MockEvaluator:
    """Saliency is a pure function of everything that defines a run; calls are counted."""

    def __init__(self, useful: set[str] | None = None) -> None:
        self.calls: list[dict] = []
        self.useful = useful

    def score(
        self,
        placement: Placement,
        criteria,
        *,
        name,
        fidelity,
        seed,
        init_seed,
        start="",
        keep=False,
        settle=None,
    ):
        self.calls.append(
            {"ids": placement.ids, "seed": seed, "init": init_seed, "start": start, "keep": keep}
        )
        saliency = {}
        for criterion in criteria:
            noise = random.Random(f"{placement.digest}{criterion}{seed}{init_seed}{start}")
            saliency[criterion] = {i: noise.random() for i in placement.ids}
            if self.useful is not None:
                for i in placement.ids:
                    saliency[criterion][i] = 0.1 * saliency[criterion][i] + (i in self.useful)
        key = f"run{len(self.calls)}"
        return Scored(saliency, key=key, seconds=1.0, steps=10, rows=5, peak_memory_bytes=7)


def make_problem(
    space: SearchSpace, limit: int, evaluator=None, unit="parameters", seed=0
) -> Problem:
    return Problem(space, limit, unit, evaluator or MockEvaluator(), 1000, Fidelity(), seed)


def half(space: SearchSpace) -> int:
    return cost(space.full(), "parameters") // 2


def unshared_warm_up(strategy: HybridPruning, problem: Problem) -> dict[str, list[str]]:
    """Six separate warm-ups, one criterion at a time, written without any sharing."""
    removed = {}
    for criterion in strategy.criteria:
        alone = HybridPruning(criteria=(criterion,), warmup_turns=strategy.warmup_turns)
        evaluator = problem.evaluator

        class OneAtATime:
            def score(
                self, placement, criteria, evaluator=evaluator, criterion=criterion, **kwargs
            ):
                full = evaluator.score(placement, tuple(PAPER_CRITERIA), **kwargs)
                return Scored({criterion: full.saliency[criterion]}, key=full.key)

        single = Problem(
            problem.space,
            problem.limit,
            problem.unit,
            OneAtATime(),
            problem.n_train,
            problem.fidelity,
            problem.seed,
        )
        result = alone.search(single)
        turns = result.history["warmup"]["turns"]
        removed[criterion] = [i for t in turns for i in t["removed"]]
    return removed


def test_warm_up_sharing_equals_separate_warm_ups_and_runs_less():
    space = make_space(12)
    strategy = HybridPruning()
    problem = make_problem(space, half(space))
    shared = strategy.search(problem).history["warmup"]
    by_criterion = {
        c: [i for t in shared["turns"] if t["criterion"] == c for i in t["removed"]]
        for c in PAPER_CRITERIA
    }
    assert by_criterion == unshared_warm_up(strategy, problem)
    assert shared["runs_unshared"] == 18
    assert shared["runs"] <= 13  # one run in the first turn, at most six in each later one


@pytest.mark.parametrize(
    ("train_steps", "turns"), [(0, 3), (100, 1), (1250, 1), (1270, 2), (2330, 2), (2350, 3)]
)
def test_the_warm_up_takes_a_tenth_of_the_training_or_one_turn(train_steps, turns):
    # A run is 3 epochs of 6 batches, 18 steps; runs at most: 1, 7, 13.
    space = make_space(12)
    problem = replace(make_problem(space, half(space)), train_steps=train_steps)
    log = HybridPruning(criteria=PAPER_CRITERIA).search(problem).history["warmup"]["turns"]
    assert {entry["turn"] for entry in log} == set(range(1, turns + 1))
    removed = sum(len(e["removed"]) for e in log if e["criterion"] == "snip")
    assert removed == round(len(space) * 3 / 16 / turns) * turns
    given = HybridPruning(warmup_turns=2).search(problem).history["warmup"]["turns"]
    assert {entry["turn"] for entry in given} == {1, 2}


@pytest.mark.parametrize(
    ("n_train", "epochs", "expected"),
    [(10_000, 3, 0.5), (10_000, 20, 1.0), (1000, 3, 0.5), (200, 3, 0.8), (100, 3, 1.0)],
)
def test_rounds_take_half_of_the_training_by_default(n_train, epochs, expected):
    space = make_space(4)
    problem = replace(
        make_problem(space, half(space)), n_train=n_train, train_steps=epochs * (n_train // 16)
    )
    assert HybridPruning().default_share(problem) == pytest.approx(expected, abs=0.01)
    twice = replace(problem, fidelity=Fidelity(1.0, 2))
    if n_train > 1000:
        assert HybridPruning(rounds=6).default_share(problem) < expected or expected == 1.0
        assert HybridPruning().default_share(twice) <= expected


def test_criteria_that_agree_share_every_run():
    space = make_space(12)
    evaluator = MockEvaluator(useful=set())
    original = evaluator.score

    def same_for_all(placement, criteria, **kwargs):
        scored = original(placement, criteria, **kwargs)
        first = scored.saliency[criteria[0]]
        return Scored({c: first for c in criteria}, key=scored.key)

    evaluator.score = same_for_all
    warmup = HybridPruning().search(make_problem(space, half(space), evaluator)).history["warmup"]
    assert warmup["runs"] == 3


@settings(max_examples=200, deadline=None)
@given(
    share=st.floats(0.02, 1.2),
    rank=st.integers(1, 12),
    width=st.integers(1, 20),
    layers=st.integers(1, 8),
    rounds=st.integers(1, 4),
    per_round=st.one_of(st.none(), st.integers(1, 5)),
    unit=st.sampled_from(["parameters", "modules", "rank"]),
    seed=st.integers(0, 100),
)
def test_budget_is_never_exceeded_and_no_removed_module_would_fit(
    share, rank, width, layers, rounds, per_round, unit, seed
):
    space = make_space(layers, rank, width)
    total = cost(space.full(), unit)
    limit = int(total * share)
    problem = make_problem(space, limit, unit=unit, seed=seed)
    smallest = min(slot_cost(s, s.sizes[-1], unit) for s in space)
    strategy = HybridPruning(rounds=rounds, per_round=per_round, warmup=False)
    if smallest > limit:
        with pytest.raises(BudgetError, match="smallest module"):
            strategy.search(problem)
        return
    kept = strategy.search(problem).placement
    assert len(kept) >= 1
    assert cost(kept, unit) <= limit
    gone = [s for s in space if s not in kept]
    for slot in gone:
        assert cost(kept, unit) + slot_cost(slot, slot.sizes[-1], unit) > limit


def test_planted_useful_modules_survive_hybrid_but_not_random_pruning():
    space = make_space(8)
    useful = {s.id for s in space if s.layer % 2 == 0}
    limit = sum(slot_cost(s, s.sizes[-1], "parameters") for s in space if s.id in useful)
    kept, lucky = [], []
    for seed in range(5):
        evaluator = MockEvaluator(useful)
        problem = make_problem(space, limit, evaluator, seed=seed)
        kept.append(set(HybridPruning().search(problem).placement.ids) == useful)
        lucky.append(set(HybridPruning(mode="random").search(problem).placement.ids) == useful)
    assert all(kept)
    assert not any(lucky)


def test_reinitialisation_policies():
    space = make_space()
    seen = {}
    for policy in ("reset", "init", "keep"):
        evaluator = MockEvaluator()
        HybridPruning(reinit=policy, warmup=False).search(
            make_problem(space, half(space), evaluator)
        )
        seen[policy] = evaluator.calls
    assert len({c["init"] for c in seen["reset"]}) == len(seen["reset"]) > 1
    assert len({c["init"] for c in seen["init"]}) == 1
    assert [c["start"] for c in seen["keep"]] == [
        "",
        *(f"run{i}" for i in range(1, len(seen["keep"]))),
    ]
    assert all(c["keep"] for c in seen["keep"])


def test_modes():
    space = make_space()
    problem = make_problem(space, half(space))
    none = HybridPruning(mode="none").search(problem)
    assert none.placement == space.full()
    assert none.runs == 0
    single = HybridPruning(mode="single:snip").search(problem)
    assert single.history["strategy"] == {"all": ["snip"]}
    scores = single.history["rounds"][0]["saliency"]
    assert list(scores) == ["snip"]
    first_gone = single.history["rounds"][0]["removed"][0]
    assert first_gone == min(scores["snip"], key=lambda i: scores["snip"][i])
    whole = HybridPruning(mode="no_partitions").search(problem)
    assert whole.history["strategy"] == {"all": list(PAPER_CRITERIA)}
    assert whole.history["warmup"] is None


def test_a_given_strategy_replaces_the_warm_up():
    space = make_space()
    first = HybridPruning().search(make_problem(space, half(space)))
    evaluator = MockEvaluator()
    again = HybridPruning(strategy=first.history["strategy"]).search(
        make_problem(space, half(space), evaluator)
    )
    assert again.history["warmup"] is None
    assert again.history["strategy"] == first.history["strategy"]
    assert again.placement == first.placement  # same seeds, same rounds


def test_a_strategy_of_other_partitions_is_refused():
    space = make_space()
    strategy = HybridPruning(strategy={"decoder.0.lora": ["snip"]})
    with pytest.raises(ConfigError, match=r"covers decoder\.0\.lora, but the partitions here"):
        strategy.search(make_problem(space, half(space)))


def test_without_warm_up_the_authors_table_is_used():
    result = HybridPruning(warmup=False).search(make_problem(make_space(24), half(make_space(24))))
    assert result.history["strategy"]["encoder.0.lora"] == ["activation", "threshold"]
    assert result.history["strategy"]["encoder.3.serial_adapter"] == ["snip"]


def test_per_round_removes_that_many_until_the_budget():
    space = make_space(8)
    result = HybridPruning(per_round=2, warmup=False).search(make_problem(space, half(space)))
    sizes = [len(r["removed"]) for r in result.history["rounds"]]
    assert sizes[:-1] == [2] * (len(sizes) - 1)


@pytest.mark.parametrize("per_round", [1, 5, 16])
def test_rounds_of_so_many_modules_take_their_share_of_the_training_together(per_round):
    space = make_space(8)
    problem = replace(make_problem(space, half(space)), n_train=400_000, train_steps=30_000)
    strategy = HybridPruning(per_round=per_round, warmup=False)
    rounds = strategy.most_rounds(len(space))
    assert rounds == -(-len(space) // per_round)
    share = strategy.default_share(problem)
    assert rounds * problem.n_steps(Fidelity(share, 1)) == pytest.approx(0.5 * 30_000, rel=0.01)


def test_a_budget_above_the_supernet_prunes_nothing():
    space = make_space()
    evaluator = MockEvaluator()
    result = HybridPruning().search(make_problem(space, 10**9, evaluator))
    assert result.placement == space.full()
    assert evaluator.calls == []


def test_history_is_json_and_the_search_replays():
    space = make_space()
    first = HybridPruning().search(make_problem(space, half(space)))
    second = HybridPruning().search(make_problem(space, half(space)))
    assert json.loads(json.dumps(first.history)) == json.loads(json.dumps(second.history))
    assert first.placement == second.placement
    assert first.seconds == first.runs * 1.0


@pytest.mark.parametrize(
    ("settings_", "error", "match"),
    [
        ({"mode": "hybird"}, ConfigError, "search.mode 'hybird'"),
        ({"mode": "single:snop"}, UnknownNameError, "did you mean 'snip'"),
        ({"reinit": "again"}, ConfigError, "search.reinit 'again'"),
        ({"criteria": ()}, ConfigError, "search.criteria is empty"),
        ({"criteria": ("snipp",)}, UnknownNameError, "did you mean 'snip'"),
        ({"strategy": {"encoder.0.lora": ["grad"]}}, UnknownNameError, "unknown criterion 'grad'"),
    ],
)
def test_wrong_settings(settings_, error, match):
    with pytest.raises(error, match=match):
        HybridPruning(**settings_)


# --- low layers are freed ------------------------------------------------------------------------


def freed(placement: Placement) -> int:
    return min(s.layer for s in placement)


def test_low_layers_are_freed_as_far_as_the_price_says():
    space = make_space(6)
    useful = {s.id for s in space if s.layer >= 3}
    limit = cost(space.full(), "parameters") * 2 // 3
    found = {}
    for price in (0.0, 0.05, 0.5, 5.0):
        evaluator = MockEvaluator(useful)
        problem = make_problem(space, limit, evaluator)
        result = HybridPruning(cost_aware=price).search(problem)
        found[price] = result.placement
        assert 0 < cost(result.placement, "parameters") <= limit
        kept = set(result.placement.ids)
        for entry in result.history["rounds"]:
            assert not set(entry["returned"]) - kept
    assert freed(found[0.0]) < 3  # the budget has room for useless modules
    assert freed(found[0.5]) == 3  # useless layers cost training time
    assert useful <= set(found[0.5].ids)
    assert freed(found[5.0]) > 3
    assert freed(found[0.0]) <= freed(found[0.05]) <= freed(found[0.5])


@settings(max_examples=60, deadline=None)
@given(
    price=st.floats(0.0, 3.0),
    share=st.floats(0.1, 1.0),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 50),
)
def test_the_budget_holds_with_freed_layers_and_nothing_above_them_would_fit(
    price, share, rounds, seed
):
    space = make_space(5)
    limit = int(cost(space.full(), "parameters") * share)
    problem = make_problem(space, limit, seed=seed)
    if min(problem.slot_costs().values()) > limit:
        return
    kept = HybridPruning(rounds=rounds, warmup=False, cost_aware=price).search(problem).placement
    assert len(kept) >= 1
    assert problem.cost(kept) <= limit
    costs, floor = problem.slot_costs(), freed(kept)
    for slot in space:
        if slot not in kept and slot.layer >= floor:
            assert problem.cost(kept) + costs[slot.id] > limit


@pytest.mark.parametrize(
    "wrong",
    [
        {"cost_aware": -0.1},
        {"settle": 0.0},
        {"settle": 1.5},
        {"cost_aware": 1.0, "per_round": 2},
        {"cost_aware": 1.0, "mode": "random"},
        {"settle": 0.9, "mode": "none"},
    ],
)
def test_wrong_prices_and_thresholds_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HybridPruning(**wrong)
