"""Selection under a budget."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.criteria.select import prune_count, prune_to, removal_order
from prunepeft.errors import BudgetError, ConfigError


class Case(NamedTuple):
    """Costs in a random removal order, with a limit that at least one unit meets."""

    costs: dict[str, int]
    order: list[str]
    limit: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    costs = {f"u{i}": value for i, value in enumerate(values)}
    order = draw(st.permutations(list(costs)))
    limit = draw(st.integers(min(values), sum(values) + 5))
    return Case(costs, list(order), limit)


def kept_cost(case: Case, removed: list[str]) -> int:
    return sum(case.costs.values()) - sum(case.costs[unit] for unit in removed)


def two_phases(case: Case) -> set[str]:
    """The definition: remove until the rest fits, then put back what still fits."""
    removed: list[str] = []
    for unit in case.order:
        if kept_cost(case, removed) <= case.limit:
            break
        removed.append(unit)
    for unit in removed[::-1]:
        if kept_cost(case, removed) + case.costs[unit] <= case.limit:
            removed.remove(unit)
    return set(removed)


@given(cases())
@settings(max_examples=500)
def test_equals_its_definition(case: Case) -> None:
    assert set(prune_to(*case)) == two_phases(case)


@given(cases(), st.booleans())
@settings(max_examples=500)
def test_never_above_the_limit(case: Case, refill: bool) -> None:
    removed = prune_to(*case, refill=refill)
    assert kept_cost(case, removed) <= case.limit
    assert removed == [unit for unit in case.order if unit in removed]


@given(cases())
@settings(max_examples=500)
def test_gap_is_below_the_smallest_removed_unit(case: Case) -> None:
    removed = prune_to(*case)
    assert len(removed) < len(case.order)
    if removed:
        assert case.limit - kept_cost(case, removed) < min(case.costs[unit] for unit in removed)


@given(cases(), st.integers(0, 30), st.booleans())
@settings(max_examples=500)
def test_larger_limit_keeps_at_least_as_much_cost(case: Case, more: int, refill: bool) -> None:
    smaller = kept_cost(case, prune_to(*case, refill=refill))
    larger = case._replace(limit=case.limit + more)
    assert kept_cost(case, prune_to(*larger, refill=refill)) >= smaller


@given(cases())
def test_without_refill_it_is_the_shortest_prefix(case: Case) -> None:
    removed = prune_to(*case, refill=False)
    assert removed == case.order[: len(removed)]
    if removed:
        assert kept_cost(case, removed[:-1]) > case.limit


@given(cases(), st.randoms())
def test_order_of_the_costs_does_not_matter(case: Case, random) -> None:
    items = list(case.costs.items())
    random.shuffle(items)
    assert prune_to(dict(items), case.order, case.limit) == prune_to(*case)


@given(cases())
def test_names_do_not_matter(case: Case) -> None:
    renamed = {unit: f"{hash(unit)}-{unit}" for unit in case.order}
    costs = {renamed[unit]: value for unit, value in case.costs.items()}
    found = prune_to(costs, [renamed[unit] for unit in case.order], case.limit)
    assert found == [renamed[unit] for unit in prune_to(*case)]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), max_size=12))
@settings(max_examples=500)
def test_removal_order_is_sorted_and_stable(values: list[float]) -> None:
    order = [f"u{i}" for i in range(len(values))][::-1]
    probability = {f"u{i}": value for i, value in enumerate(values)}
    found = removal_order(probability, order)
    expected = sorted(order, key=lambda unit: (-probability[unit], order.index(unit)))
    assert found == expected


def test_exact_budget_removes_nothing() -> None:
    assert prune_to({"a": 2, "b": 3}, ["a", "b"], 5) == []


def test_refill_brings_back_the_most_salient_that_fits() -> None:
    costs = {"small": 1, "other": 1, "big": 9, "last": 4}
    assert prune_to(costs, list(costs), 5) == ["small", "big"]
    assert prune_to(costs, list(costs), 5, refill=False) == ["small", "other", "big"]


def test_limit_below_the_smallest_is_refused() -> None:
    with pytest.raises(
        BudgetError, match=r"smallest module, encoder\.0\.ffn\.down:lora, costs 40.* 39;"
    ):
        prune_to({"big": 50, "encoder.0.ffn.down:lora": 40}, ["big", "encoder.0.ffn.down:lora"], 39)


def test_nothing_to_prune() -> None:
    assert prune_to({}, [], 0) == []


@pytest.mark.parametrize(
    ("order", "odd"), [(["a"], "b"), (["a", "b", "c"], "c"), (["a", "b", "b"], "b")]
)
def test_costs_must_match_the_order(order: list[str], odd: str) -> None:
    with pytest.raises(ConfigError, match=rf"give each unit once \(see {odd}\)"):
        prune_to({"a": 1, "b": 1}, order, 2)


def test_removal_order_needs_finite_numbers_for_all_units() -> None:
    with pytest.raises(ConfigError, match="probability of b is nan"):
        removal_order({"a": 1.0, "b": float("nan")}, ["a", "b"])
    with pytest.raises(ConfigError, match="probabilities for 1 units do not match the order of 2"):
        removal_order({"a": 1.0}, ["a", "b"])


def test_prune_count() -> None:
    assert prune_count(["a", "b", "c"], 2) == ["a", "b"]
    assert prune_count(["a"], 5) == ["a"]
    assert prune_count(["a"], 0) == []
    with pytest.raises(ConfigError, match="must be 0 or more; got -1"):
        prune_count(["a"], -1)
