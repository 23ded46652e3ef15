"""From importance to ranks: worked numbers, and what holds for every importance and budget."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.candidates import make_space
from prunepeft.kinds import slot_cost, slot_kind
from prunepeft.sites import find_sites
from prunepeft.strategies.allocation import (
    best_first,
    by_share,
    by_units,
    reaching,
    spent,
    uniform_size,
)
from prunepeft.strategies.allocator import rank_rows
from prunepeft.strategies.lora_drop import LoraDrop
from prunepeft.strategies.resized import with_sizes
from tests.tiny_models import TINY

NAMES = "abcdefgh"


@st.composite
def cases(draw):
    """Rows of several steps and starts, weights (some 0), and a limit."""
    n = draw(st.integers(1, len(NAMES)))
    rows, weights = {}, {}
    for i in NAMES[:n]:
        step, start = draw(st.sampled_from([1, 2, 3, 7])), draw(st.sampled_from([0, 0, 4]))
        most = draw(st.integers(1, 9))
        rows[i] = [0, *(start + step * k for k in range(1, most + 1))]
        weights[i] = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 3.0, 1e-30, 1e30]))
    return rows, weights, draw(st.integers(0, 120))


def steps(rows, sizes, ids):
    """What one more rank of each slot costs, where there is one."""
    grown = {i: sizes.get(i, 0) + 1 for i in ids}
    return [rows[i][n] - rows[i][n - 1] for i, n in grown.items() if n < len(rows[i])]


def test_shares_by_hand() -> None:
    rows = dict.fromkeys("abc", range(20))
    # 10 ranks at 5 : 3 : 2; and at 7 : 2 : 1 of 8 that is 5.6, 1.6 and 0.8
    assert by_share({"a": 5, "b": 3, "c": 2}, rows, 10) == {"a": 5, "b": 3, "c": 2}
    assert by_share({"a": 7, "b": 2, "c": 1}, rows, 8) == {"a": 5, "b": 2, "c": 1}
    assert by_share({"a": 98, "b": 1, "c": 1}, rows, 10, {"b": 2, "c": 2}) == {
        "a": 6,
        "b": 2,
        "c": 2,
    }
    assert by_share({"a": 98, "b": 1, "c": 1}, rows | {"a": range(5)}, 10) == {
        "a": 4,
        "b": 3,
        "c": 3,
    }
    # two slots of one share, one of which costs twice as much: 2 t + t = 9
    assert by_share({"a": 1, "b": 1}, {"a": range(0, 40, 2), "b": range(20)}, 9) == {"a": 3, "b": 3}


def test_without_any_importance_all_count_the_same() -> None:
    rows = dict.fromkeys("abc", range(20))
    for nothing in (0.0, math.nan, math.inf, -1.0):
        assert by_share(dict.fromkeys("abc", nothing), rows, 6) == dict.fromkeys("abc", 2)


@given(cases())
def test_shares_keep_to_the_budget_and_use_it_up(case) -> None:
    rows, weights, limit = case
    sizes = by_share(weights, rows, limit)
    assert spent(rows, sizes) <= limit
    assert all(0 < n < len(rows[i]) for i, n in sizes.items())
    alive = [i for i in rows if weights[i] > 1e-20 or not any(weights.values())]
    assert all(step > limit - spent(rows, sizes) for step in steps(rows, sizes, alive))


@given(cases())
def test_more_important_slots_of_equal_cost_never_get_less(case) -> None:
    rows, weights, limit = case
    row = rows["a"]
    sizes = by_share(weights, dict.fromkeys(rows, row), limit)
    for i in rows:
        for j in rows:
            if weights[i] > weights[j]:
                assert sizes.get(i, 0) >= sizes.get(j, 0)


@given(cases(), st.floats(0, 1))
def test_smallest_ranks_are_kept_where_all_fit(case, factor) -> None:
    rows, weights, limit = case
    least = math.floor(factor * uniform_size(rows, limit))
    lowest = {i: min(least, len(row) - 1) for i, row in rows.items()}
    sizes = by_share(weights, rows, limit, lowest)
    assert spent(rows, sizes) <= limit
    assert all(sizes.get(i, 0) >= n for i, n in lowest.items())


@given(cases())
def test_units_and_whole_modules_keep_to_the_budget(case) -> None:
    rows, weights, limit = case
    order = sorted(rows, key=lambda i: -weights[i])
    units = by_units([i for i in order for _ in rows[i][1:]], rows, limit)
    for sizes in (units, best_first(order, rows, limit)):
        assert spent(rows, sizes) <= limit
        left = limit - spent(rows, sizes)
        assert all(step > left for step in steps(rows, sizes, rows))
    assert units == best_first(order, rows, limit)


@given(cases())
def test_the_uniform_size_costs_the_budget(case) -> None:
    rows, _, limit = case
    t = uniform_size(rows, limit)
    most = max(len(row) - 1 for row in rows.values())
    assert 0 <= t <= most
    if t < most:
        whole = {i: min(math.floor(t), len(row) - 1) for i, row in rows.items()}
        assert spent(rows, whole) <= limit
        above = {i: min(math.floor(t) + 1, len(row) - 1) for i, row in rows.items()}
        assert spent(rows, above) >= limit


def test_the_smallest_set_that_reaches_a_share() -> None:
    scores = {"a": 1.0, "b": 5.0, "c": 4.0}
    assert reaching(scores, 0.5) == ["b"]
    assert reaching(scores, 0.9) == ["b", "c"]
    assert reaching(scores, 1.0) == ["b", "c", "a"]
    assert reaching(dict.fromkeys("ab", 0.0), 0.5) == ["a"]


@pytest.mark.parametrize("unit", ["parameters", "rank"])
def test_rows_are_the_costs_of_slots(unit: str) -> None:
    space = make_space(find_sites(TINY["llama"]()), ["lora", "dora"])
    for slot_id, row in rank_rows(space.slots, unit).items():
        slot = space.by_id()[slot_id]
        assert row == [0, *(slot_cost(slot, n, unit) for n in range(1, len(row)))]


def test_a_budget_below_the_best_slots_goes_to_one_that_fits() -> None:
    rows = {"large": [0, 9, 18], "small": [0, 3, 6]}
    assert by_share({"large": 5.0, "small": 0.0}, rows, 7) == {"small": 2}
    assert by_share({"large": 5.0, "small": 1.0}, rows, 8) == {"small": 2}


def test_a_share_of_modules_is_one_of_those_that_fit() -> None:
    slots = make_space(
        find_sites(TINY["bert"]()), ["lora"], roles={"lora": (("q",), ("up",))}
    ).slots
    rows = rank_rows(slots, "parameters")
    limit = max(row[1] for row in rows.values()) - 1
    found = {s.id: torch.tensor(float(rows[s.id][1])) for s in slots}
    for method in (LoraDrop(keep=0.1), LoraDrop(keep=1.0)):
        by_id = {s.id: s for s in slots}
        assert method.sizes(by_id, found, rows, limit)


@pytest.mark.parametrize("options", [{}, {"alpha": 32.0}, {"alpha": 3.0, "rslora": True}], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_scaling_does_not_depend_on_the_rank_given(kind, options) -> None:
    space = make_space(find_sites(TINY["bert"]()), [kind], sizes={kind: 4}, options={kind: options})
    slot = space.slots[0]
    scaling = slot_kind(slot).scaling(4)
    for size in (1, 3, 4, 11):
        new = with_sizes(slot, (size,))
        assert new.id == slot.id
        assert slot_kind(new).scaling(size) == pytest.approx(scaling)
