"""Which units to remove under a budget: pure functions on lists, exact and stable under ties."""

import math
from collections.abc import Collection, Mapping, Sequence

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


def free_low_layers(
    costs: Mapping[str, int],
    removal_order: Sequence[str],
    limit: int,
    *,
    depth: Mapping[str, float],
    worth: Mapping[str, float],
    price: float,
    refill: bool = True,
) -> list[str]:
    """Choose what to remove as `prune_to` does, or clear the lowest layers first if that pays.

    Layers below the lowest module need no backward pass, and their output can be reused, so their
    share of the training time is saved. Of all ways to clear the lowest layers entirely, the rest
    being chosen by `prune_to`, the one with the largest

        price * share of the time saved - share of the worth lost

    is taken, both against clearing none; on a tie the one that clears less.

    Args:
        costs: Cost of each of the N units.
        removal_order: The N units, first to remove first.
        limit: What the rest may cost.
        depth: Share of the model's layers that lie below each unit, in [0, 1).
        worth: What each unit is worth, not negative.
        price: Share of the worth that the whole training time is worth; 0 clears none.
        refill: See `prune_to`.
    Returns:
        The removed units, in removal order.
    Example:
        >>> order, costs = ["c", "a", "b"], {"a": 1, "b": 1, "c": 1}
        >>> depth, worth = {"a": 0.0, "b": 0.5, "c": 0.5}, {"a": 0.5, "b": 0.9, "c": 0.4}
        >>> free_low_layers(costs, order, 2, depth=depth, worth=worth, price=0.1)
        ['c']
        >>> free_low_layers(costs, order, 2, depth=depth, worth=worth, price=0.3)
        ['a']
    """
    best = prune_to(costs, removal_order, limit, refill=refill)
    if price <= 0 or not costs:
        return best
    whole = _kept(worth, best)
    lowest, gain = min(depth[u] for u in removal_order), 0.0
    for floor in sorted({depth[u] for u in removal_order})[1:]:
        above = [u for u in removal_order if depth[u] >= floor]
        if min(costs[u] for u in above) > limit:
            continue
        taken = prune_to({u: costs[u] for u in above}, above, limit, refill=refill)
        gone = {*taken, *(u for u in removal_order if depth[u] < floor)}
        lost = 1 - _kept(worth, gone) / whole if whole > 0 else 0.0
        if (found := price * (floor - lowest) - lost) > gain + 1e-12:
            best, gain = [u for u in removal_order if u in gone], found
    return best


def _kept(worth: Mapping[str, float], gone: Collection[str]) -> float:
    return math.fsum(value for unit, value in worth.items() if unit not in gone)


def _check_same(values: Mapping[str, float], order: Sequence[str], label: str) -> None:
    if len(set(order)) != len(order) or set(order) != set(values):
        odd = sorted(set(order) ^ set(values)) or sorted({u for u in order if order.count(u) > 1})
        raise ConfigError(
            f"{label} for {len(values)} units do not match the order of {len(order)}; "
            f"give each unit once (see {', '.join(odd[:3])})."
        )
