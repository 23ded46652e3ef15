"""Which units to remove under a budget: pure functions on lists, exact and stable under ties."""

import math
from collections.abc import Mapping, Sequence

from prunepeft.errors import BudgetError, ConfigError


def removal_order(probability: Mapping[str, float], order: Sequence[str]) -> list[str]:
    """Sort units by the probability of removal, largest first; ties in the given order.

    Args:
        probability: Finite number per unit, larger = removed earlier.
        order: All N units in module order.
    Returns:
        The N units, first to remove first.
    Raises:
        ConfigError: if the two name different units or a probability is not finite.
    Example:
        >>> removal_order({"a": 0.2, "b": 0.4, "c": 0.4}, ["a", "c", "b"])
        ['c', 'b', 'a']
    """
    _check_same(probability, order, "probabilities")
    if bad := [unit for unit in order if not math.isfinite(probability[unit])]:
        raise ConfigError(f"probability of {bad[0]} is {probability[bad[0]]}; give finite numbers.")
    return sorted(order, key=lambda unit: -probability[unit])


def prune_count(order: Sequence[str], k: int) -> list[str]:
    """Return the first `k` units of a removal order, all of them if there are fewer.

    Raises:
        ConfigError: if `k` is negative.
    """
    if k < 0:
        raise ConfigError(f"the number of modules to remove must be 0 or more; got {k}.")
    return list(order[:k])


def prune_to(
    costs: Mapping[str, int], removal_order: Sequence[str], limit: int, *, refill: bool = True
) -> list[str]:
    """Choose what to remove so that the rest costs at most `limit`.

    Units go in removal order until the rest fits. With `refill`, removed units that still fit
    come back, the last removed first, so that afterwards no removed unit fits: the rest costs
    more than `limit` less the smallest removed unit. Both are one pass from the most salient
    unit that keeps whatever fits.

    Args:
        costs: Cost of each of the N units.
        removal_order: The N units, first to remove first.
        limit: What the rest may cost.
        refill: Whether removed units that fit come back.
    Returns:
        The removed units, in removal order.
    Raises:
        BudgetError: if even the smallest unit costs more than `limit`.
        ConfigError: if `costs` and `removal_order` name different units.
    Example:
        >>> prune_to({"a": 3, "b": 5, "c": 4}, ["a", "b", "c"], 8)
        ['b']
    """
    _check_same(costs, removal_order, "costs")
    if not costs:
        return []
    smallest = min(removal_order, key=lambda unit: costs[unit])
    if costs[smallest] > limit:
        raise BudgetError(
            f"the smallest module, {smallest}, costs {costs[smallest]}, the budget allows {limit}; "
            "raise the budget or allow smaller sizes."
        )
    removed: list[str] = []
    kept = 0
    for unit in reversed(removal_order):
        if kept + costs[unit] > limit or (removed and not refill):
            removed.append(unit)
        else:
            kept += costs[unit]
    return removed[::-1]


def _check_same(values: Mapping[str, float], order: Sequence[str], label: str) -> None:
    if len(set(order)) != len(order) or set(order) != set(values):
        odd = sorted(set(order) ^ set(values)) or sorted({u for u in order if order.count(u) > 1})
        raise ConfigError(
            f"{label} for {len(values)} units do not match the order of {len(order)}; "
            f"give each unit once (see {', '.join(odd[:3])})."
        )
