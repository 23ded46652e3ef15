"""S-MaM: prune ranks and whole modules by first-order scores, and start afresh after every round.

put every candidate on the model
repeat: give what is left first values, train it, sum |w dL/dw| over each rank or bias vector,
    remove the lowest until the round's cost is met
train what is left from fresh values
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prunepeft.batches import derive_seed
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.evaluate import Watched
from prunepeft.kinds import slot_cost, slot_kind
from prunepeft.space import Placement, Slot
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.first_order import AGGREGATES, FirstOrder

SCHEDULES = ("linear", "geometric")


@dataclass(frozen=True)
class SMam(Strategy):
    """Structured iterative pruning with re-initialisation.

    A unit is a rank of a module (a row of LoRA's A with its column of B, a unit of a bottleneck),
    or a whole module where its kind has no ranks (a bias vector), or everywhere if the budget
    counts modules. A module that loses all its ranks goes; no unit ever returns. Modules of which
    one unit alone is over the budget take no part. A round trains for `Fidelity`; its scores are
    those of its last epoch.

    Attributes:
        rounds: Rounds in which the budget is reached.
        schedule: `linear`: the cost falls by equal amounts; `geometric`: by equal factors.
        aggregate: From weights to units, see `FirstOrder`.
        balanced: Start both factors of a unit from noise and subtract what they add at first, see
            `FirstOrder`; else from the kind's own first values.
    References:
        Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
        Models, Findings of ACL 2023, arXiv 2305.16597. There is no released code: the number of
        rounds, how scores are summed over a unit, and the subtraction are ours. Its unstructured
        variants (single weights) are left out.
    """

    name: ClassVar[str] = "smam"
    section: ClassVar[str] = "smam"

    rounds: int = 5
    schedule: str = "linear"
    aggregate: str = "mean"
    balanced: bool = True

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("aggregate", AGGREGATES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"smam.{name} {getattr(self, name)!r} is unknown; use {', '.join(known)}."
                )
        if self.rounds < 1:
            raise ConfigError(f"smam.rounds must be 1 or more; got {self.rounds}.")

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: the budget must allow one unit of one module."""
        costs = _least_costs(problem)
        smallest = min(costs, key=lambda i: costs[i])
        if costs[smallest] > problem.limit:
            raise BudgetError(
                f"the smallest unit of a module, of {smallest}, costs {costs[smallest]:,} "
                f"{problem.unit}, but the budget allows {problem.limit:,}. Raise --budget, or "
                "allow smaller kinds."
            )

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. If all candidates fit the budget, nothing is trained."""
        self.check(problem)
        full = problem.space.full()
        too_large = [i for i, n in _least_costs(problem).items() if n > problem.limit]
        result = SearchResult(full.without(set(too_large)))
        result.history = {
            "mode": "smam",
            "space": full.to_dict(),
            "partitions": {s.id: s.partition for s in full},
            "warmup": None,
            "strategy": {},
            "rounds": [],
            "too_large": too_large,
        }
        first_cost = problem.cost(result.placement)
        for number in range(1, self.rounds + 1):
            before = result.placement
            target = self.target(number, first_cost, problem.limit)
            if problem.cost(before) <= target:
                continue
            watched = self._train(problem, before, number)
            result.add(watched)
            result.placement = _prune(problem, before, watched.tensors, target)
            entry = _entry(problem, number, before, result.placement, watched)
            result.history["rounds"].append(entry)
            problem.on_event(
                "round", round=number, modules=len(result.placement), cost=entry["cost_after"]
            )
        return result

    def target(self, number: int, first_cost: int, limit: int) -> int:
        """What may be left after a round, counted from 1; the last one meets the limit.

        Example:
            >>> [SMam(rounds=3).target(j, 100, 10) for j in (1, 2, 3)]
            [70, 40, 10]
            >>> [SMam(rounds=2, schedule="geometric").target(j, 1000, 10) for j in (1, 2)]
            [100, 10]
        """
        if first_cost <= limit or number >= self.rounds:
            return limit
        if self.schedule == "linear":
            return first_cost - (first_cost - limit) * number // self.rounds
        return max(limit, round(first_cost * (limit / first_cost) ** (number / self.rounds)))

    def _train(self, problem: Problem, placement: Placement, number: int) -> Watched:
        watcher = FirstOrder(
            aggregate=self.aggregate,
            balanced=self.balanced,
            whole=problem.unit == "modules",
            seed=derive_seed(problem.seed, "balance", number),
        )
        return problem.evaluator.watch(
            placement,
            watcher,
            name=f"round {number}/{self.rounds}",
            fidelity=problem.fidelity,
            seed=derive_seed(problem.seed, "round", number),
            init_seed=derive_seed(problem.seed, "init", number),
        )


def choose_sizes(
    scores: Mapping[str, Sequence[float]], cost: Callable[[str, int], int], limit: int
) -> dict[str, int]:
    """How many units of each slot stay when the lowest go until the rest costs at most `limit`.

    Then units that still fit come back, the best first, so that none of those removed fits.

    Args:
        scores: Slot id -> score of each of its units; ties go in order.
        cost: Of a slot with so many units; 0 with none.
        limit: What all may cost.
    Returns:
        Slot id -> units that stay, slots without any left out.
    Raises:
        BudgetError: if nothing would be left.
    Example:
        >>> choose_sizes({"a": [3.0, 1.0], "b": [2.0]}, lambda i, n: n * {"a": 2, "b": 3}[i], 5)
        {'a': 1, 'b': 1}
    """
    sizes = {i: len(s) for i, s in scores.items()}
    total = sum(cost(i, n) for i, n in sizes.items())
    order = sorted(((v, i) for i, s in scores.items() for v in s), key=lambda pair: pair[0])
    gone: list[str] = []
    for _, slot_id in order:
        if total <= limit:
            break
        sizes[slot_id] -= 1
        total -= cost(slot_id, sizes[slot_id] + 1) - cost(slot_id, sizes[slot_id])
        gone.append(slot_id)
    for slot_id in reversed(gone):
        more = cost(slot_id, sizes[slot_id] + 1) - cost(slot_id, sizes[slot_id])
        if total + more <= limit:
            sizes[slot_id] += 1
            total += more
    kept = {i: n for i, n in sizes.items() if n}
    if not kept:
        raise BudgetError(
            f"no module fits the budget of {limit:,}, not even with one rank. Raise the budget or "
            "allow smaller kinds."
        )
    return kept


def _least_costs(problem: Problem) -> dict[str, int]:
    """Cost of one unit of each slot, with what the slot needs beside its ranks."""

    def least(slot: Slot) -> int:
        return 1 if problem.unit != "modules" and slot_kind(slot).shrink_axes else slot.sizes[-1]

    return {s.id: slot_cost(s, least(s), problem.unit) for s in problem.space}


def _prune(
    problem: Problem, before: Placement, found: Mapping[str, Tensor], target: int
) -> Placement:
    """What is left of a placement; its weights start afresh, so only the sizes matter."""
    slots = {slot.id: slot for slot in before}
    scores = {i: found[i].tolist() for i in slots}
    # A module that is one unit comes and goes with its whole size.
    per_unit = {i: before.sizes[slots[i]] // len(s) for i, s in scores.items()}

    def cost(slot_id: str, n: int) -> int:
        return slot_cost(slots[slot_id], n * per_unit[slot_id], problem.unit) if n else 0

    kept = choose_sizes(scores, cost, target)
    return Placement({slots[i]: n * per_unit[i] for i, n in kept.items()})


def _entry(
    problem: Problem, number: int, before: Placement, after: Placement, watched: Watched
) -> dict[str, Any]:
    """What a round changed; the saliency of a module is the mean score of its units."""
    kept = set(after.ids)
    scores = {i: watched.tensors[i].tolist() for i in before.ids}
    return {
        "round": number,
        "cost_before": problem.cost(before),
        "cost_after": problem.cost(after),
        "removed": [i for i in before.ids if i not in kept],
        "returned": [],
        "saliency": {"first_order": {i: sum(s) / len(s) for i, s in scores.items()}},
        "probability": {},
        "units": scores,
        "sizes": {slot.id: n for slot, n in after.sizes.items()},
        "seconds": watched.seconds,
        "steps": watched.steps,
        "rows": watched.rows,
    }
