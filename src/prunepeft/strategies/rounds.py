"""What a round of pruning changed, and what comes back at the end."""

from collections.abc import Sequence
from typing import Any

from prunepeft.space import Placement, depth_below
from prunepeft.strategies.base import Problem


def refill(
    problem: Problem, kept: Placement, graveyard: Sequence[str], *, frees_layers: bool
) -> set[str]:
    """Removed modules that still fit, the last removed first: afterwards none fits.

    Args:
        problem: With the budget.
        kept: What is left.
        graveyard: Ids of removed modules in the order in which they went.
        frees_layers: Layers below the lowest module that is left stay free.
    """
    costs, depth = problem.slot_costs(), depth_below(problem.space)
    room = problem.limit - problem.cost(kept)
    floor = min((depth[i] for i in kept.ids), default=0.0) if frees_layers else 0.0
    back: set[str] = set()
    for slot_id in reversed(graveyard):
        if slot_id not in back and costs[slot_id] <= room and depth[slot_id] >= floor:
            back.add(slot_id)
            room -= costs[slot_id]
    return back


def entry(
    problem: Problem, number: int, before: Placement, after: Placement, gone: Sequence[str]
) -> dict[str, Any]:
    """What a round changed; `returned` modules went in an earlier round and fit after all."""
    kept = set(after.ids)
    return {
        "round": number,
        "cost_before": problem.cost(before),
        "cost_after": problem.cost(after),
        "removed": [i for i in gone if i not in kept],
        "returned": [i for i in after.ids if i not in before.ids],
    }
