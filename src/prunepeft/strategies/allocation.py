"""From importance to sizes under a budget: pure functions of what each size of each slot costs.

`rows` says what may be chosen: slot id -> cost of size 0, 1, ... up to the largest; cost 0 at
size 0, never falling. What is returned holds the sizes that are not 0, in the order of `rows`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

Rows = Mapping[str, Sequence[int]]
_HALVINGS = 200


def spent(rows: Rows, sizes: Mapping[str, int]) -> int:
    """What these sizes cost together."""
    return sum(rows[i][n] for i, n in sizes.items())


def within(rows: Rows, limit: int) -> set[str]:
    """Slots that fit alone at their smallest size."""
    return {i for i, row in rows.items() if len(row) > 1 and row[1] <= limit}


def uniform_size(rows: Rows, limit: int) -> float:
    """The size, perhaps not whole, that every slot could have if all had the same.

    Example:
        >>> uniform_size({"a": range(0, 90, 10), "b": range(0, 180, 20)}, 75)
        2.5
    """
    return _scaled(dict.fromkeys(rows, 1.0), rows, limit, dict.fromkeys(rows, 0))


def by_share(
    weights: Mapping[str, float], rows: Rows, limit: int, lowest: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes in proportion to weights, rounded by largest remainder.

    All sizes are t w_i, between the lowest and the largest of the slot, with the factor t at which
    the budget is met exactly. They are rounded down; then the slot that lacks most of its
    share grows by one, as long as a slot can grow within the budget. So of two slots that cost the
    same, the one of larger weight never gets less, and what is left over pays for no further size.

    Args:
        weights: Slot id -> what its size is proportional to; 0: none. Not finite counts as 0, and
            so does a slot that alone is over the limit. If all are 0, all count the same.
        rows: See above.
        limit: What all may cost.
        lowest: Smallest sizes; these must fit together.
    Example:
        >>> by_share({"a": 3.0, "b": 1.0}, {"a": range(9), "b": range(9)}, 7)
        {'a': 5, 'b': 2}
    """
    least = {i: 0 for i in rows} | dict(lowest or {})
    able = within(rows, limit)
    finite = {i: w if 0 < (w := weights[i]) < math.inf and i in able else 0.0 for i in rows}
    if not any(finite.values()):
        finite = dict.fromkeys(rows, 1.0)
    top = max(finite.values())
    finite = {i: w / top for i, w in finite.items()}
    t = _scaled(finite, rows, limit, least)
    wanted = {i: t * w for i, w in finite.items()}
    sizes = {i: math.floor(_clamped(wanted[i], least[i], len(rows[i]) - 1)) for i in rows}
    left = limit - spent(rows, sizes)
    while True:
        steps = {
            i: rows[i][n + 1] - rows[i][n]
            for i, n in sizes.items()
            if n + 1 < len(rows[i]) and finite[i] > 0
        }
        can = [i for i, cost in steps.items() if cost <= left]
        if not can:
            return {i: n for i, n in sizes.items() if n}
        grows = max(can, key=lambda i: (wanted[i] - sizes[i], finite[i]))
        sizes[grows] += 1
        left -= steps[grows]


def by_units(order: Iterable[str], rows: Rows, limit: int) -> dict[str, int]:
    """One more rank for each mention of a slot, the first first, where it fits.

    Args:
        order: Slot ids, the most valuable rank first.
        rows: See above.
        limit: What all may cost.
    Example:
        >>> by_units("aab", {"a": [0, 2, 4], "b": [0, 1]}, 3)
        {'a': 1, 'b': 1}
    """
    sizes, left = dict.fromkeys(rows, 0), limit
    for i in order:
        n = sizes[i] + 1
        if n < len(rows[i]) and rows[i][n] - rows[i][n - 1] <= left:
            left -= rows[i][n] - rows[i][n - 1]
            sizes[i] = n
    return {i: n for i, n in sizes.items() if n}


def best_first(order: Sequence[str], rows: Rows, limit: int) -> dict[str, int]:
    """The largest size of each slot that still fits, slot by slot.

    Args:
        order: Slot ids, the most important first.
        rows: See above.
        limit: What all may cost.
    Example:
        >>> best_first("ab", {"a": [0, 2, 4], "b": [0, 2, 4]}, 7)
        {'a': 2, 'b': 1}
    """
    sizes, left = dict.fromkeys(rows, 0), limit
    for i in order:
        sizes[i] = max(n for n, cost in enumerate(rows[i]) if cost <= left)
        left -= rows[i][sizes[i]]
    return {i: n for i, n in sizes.items() if n}


def reaching(importance: Mapping[str, float], share: float) -> list[str]:
    """The smallest set of slots, best first, that holds this share of all importance.

    Example:
        >>> reaching({"a": 1.0, "b": 6.0, "c": 3.0}, 0.9)
        ['b', 'c']
    """
    order = sorted(importance, key=lambda i: -importance[i])
    total, kept = sum(importance.values()), 0.0
    for n, i in enumerate(order, 1):
        kept += importance[i]
        if kept >= share * total * (1 - 1e-12):
            return order[:n]
    return order


def _scaled(
    weights: Mapping[str, float], rows: Rows, limit: int, least: Mapping[str, int]
) -> float:
    """The largest t for which the sizes t w_i, clamped and not rounded, cost at most the limit."""

    def cost(t: float) -> float:
        return sum(
            _cost(rows[i], _clamped(t * w, least[i], len(rows[i]) - 1)) for i, w in weights.items()
        )

    positive = [(len(rows[i]) - 1) / w for i, w in weights.items() if w > 0]
    low, high = 0.0, max(positive)
    if cost(high) <= limit:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def _cost(row: Sequence[int], size: float) -> float:
    """Cost of a size between two whole ones, along a line."""
    n = min(int(size), len(row) - 1)
    return row[n] + (size - n) * (row[n + 1] - row[n]) if n + 1 < len(row) else row[n]


def _clamped(value: float, low: int, high: int) -> float:
    return min(max(value, low), high)
