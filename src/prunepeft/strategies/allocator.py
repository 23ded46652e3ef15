"""Base of the methods that look at the base model once and give every LoRA a rank of its own."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from prunepeft.batches import derive_seed
from prunepeft.budget import Fidelity
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.evaluate import Watched
from prunepeft.kinds import slot_cost
from prunepeft.probes import Probe
from prunepeft.space import MAX_SIZE, Placement, Slot
from prunepeft.strategies.allocation import Rows, best_first, by_share, uniform_size
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.resized import with_sizes

LOW_RANK = ("lora", "dora")


@dataclass(frozen=True)
class Allocator(Strategy):
    """One calibration, then ranks; these are trained from fresh values like any placement.

    Slots of kinds that are not LoRA or DoRA get nothing, and a layer that could have both gets the
    one named first. Ranks do not depend on the sizes of the space. If the budget counts
    modules, ranks cost nothing: the most important modules stay, at the size of the space.

    Attributes:
        max_factor: Largest rank, in times the rank that all modules could have alike; None: the
            method's own `default_max`.
    """

    section: ClassVar[str] = "allocate"
    default_max: ClassVar[float] = 2.0

    max_factor: float | None = None

    def __post_init__(self) -> None:
        if self.max_factor is not None and not 1 <= self.max_factor < math.inf:
            raise ConfigError(
                f"allocate.max_factor must be 1 or more; got {self.max_factor!r}. 1 gives all "
                "modules the same rank."
            )

    @abstractmethod
    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> Probe:
        """What to find out.

        Args:
            problem: The problem.
            slots: Where modules may go.
            rank: What all could have alike.
        """

    def importance(self, slot: Slot, found: Tensor) -> float:
        """One number for a slot, from what was found for it."""
        return float(found)

    def sizes(
        self, slots: Mapping[str, Slot], found: Mapping[str, Tensor], rows: Rows, limit: int
    ) -> dict[str, int]:
        """Ranks within the budget: in proportion to importance, if not overridden."""
        weights = {i: self.importance(slot, found[i]) for i, slot in slots.items()}
        return by_share(weights, rows, limit)

    def order(self, scores: Mapping[str, float], rows: Rows) -> list[str]:
        """Slots that may stay where the budget counts modules, the best first."""
        return sorted(scores, key=lambda i: -scores[i])

    def fidelity(self, problem: Problem) -> Fidelity:
        """How much of the training rows is looked at."""
        return problem.fidelity

    def passes(self, epochs: int) -> int:
        """How often these rows are read, at most, where training takes so many epochs."""
        return epochs

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: a kind with ranks, and a budget for rank 1 somewhere."""
        costs = {s.id: slot_cost(s, 1, problem.unit) for s in low_rank_slots(problem)}
        smallest = min(costs, key=lambda i: costs[i])
        if costs[smallest] > problem.limit:
            raise BudgetError(
                f"rank 1 on the smallest module, {smallest}, costs {costs[smallest]:,} "
                f"{problem.unit}, but the budget allows {problem.limit:,}. Raise --budget."
            )

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`."""
        self.check(problem)
        slots = low_rank_slots(problem)
        rows, rank = self.rows(problem, slots)
        watched = problem.evaluator.calibrate(
            self.probe(problem, slots, rank),
            name=self.name,
            fidelity=self.fidelity(problem),
            seed=derive_seed(problem.seed, "calibration"),
        )
        by_id, found = {s.id: s for s in slots}, watched.tensors
        scores = {i: self.importance(slot, found[i]) for i, slot in by_id.items()}
        if problem.unit == "modules":
            sizes = best_first(self.order(scores, rows), rows, problem.limit)
        else:
            sizes = self.sizes(by_id, found, rows, problem.limit)
        placement = Placement({with_sizes(by_id[i], (n,)): n for i, n in sizes.items()})
        result = SearchResult(placement)
        result.add(watched)
        result.history = self._record(problem, slots, placement, scores, watched)
        cost = problem.cost(placement)
        problem.on_event("round", round=1, modules=len(placement), cost=cost)
        return result

    def rows(self, problem: Problem, slots: Sequence[Slot]) -> tuple[Rows, float]:
        """What each rank costs, up to the largest allowed; and the rank that all could have."""
        if problem.unit == "modules":
            sizes = {s.id: s.sizes[-1] for s in slots}
            rows = {i: [0, *[1] * n] for i, n in sizes.items()}
            return rows, sum(sizes.values()) / len(sizes)
        rows = rank_rows(slots, problem.unit)
        rank = uniform_size(rows, problem.limit)
        return {i: row[: self.largest(rank) + 1] for i, row in rows.items()}, rank

    def largest(self, rank: float) -> int:
        """Largest rank of a module, where all could have `rank`."""
        factor = self.default_max if self.max_factor is None else self.max_factor
        return max(1, math.ceil(factor * rank))

    def _record(
        self,
        problem: Problem,
        slots: Sequence[Slot],
        placement: Placement,
        scores: Mapping[str, float],
        watched: Watched,
    ) -> dict[str, Any]:
        """What a report needs, as plain JSON values."""
        full, kept = problem.space.full(), set(placement.ids)
        entry = {
            "round": 1,
            "cost_before": problem.cost(full),
            "cost_after": problem.cost(placement),
            "removed": [i for i in full.ids if i not in kept],
            "returned": [],
            "saliency": {self.name: dict(scores)},
            "probability": {},
            "sizes": {slot.id: n for slot, n in placement.sizes.items()},
            "seconds": watched.seconds,
            "steps": watched.steps,
            "rows": watched.rows,
        }
        used = {s.id for s in slots}
        return {
            "mode": self.name,
            "space": full.to_dict(),
            "partitions": {s.id: s.partition for s in full},
            "warmup": None,
            "strategy": {},
            "rounds": [entry],
            "left_out": [s.id for s in full if s.id not in used],
        }


@dataclass(frozen=True)
class BatchAllocator(Allocator):
    """An allocator that looks at some batches.

    Attributes:
        batches: Batches of rows looked at, at most; fewer if `Fidelity` holds fewer rows.
    """

    batches: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise ConfigError(f"allocate.batches must be 1 or more; got {self.batches}.")

    def fidelity(self, problem: Problem) -> Fidelity:
        """See `Allocator.fidelity`."""
        share = min(1.0, self.batches * problem.batch_size / problem.n_train)
        return replace(problem.fidelity, data=min(problem.fidelity.data, share))


def low_rank_slots(problem: Problem) -> tuple[Slot, ...]:
    """Slots of LoRA or DoRA, at most one on a layer; ConfigError if there is none."""
    taken: set[str] = set()
    slots: list[Slot] = []
    for slot in problem.space:
        paths = {site.path for site in slot.sites}
        if slot.kind in LOW_RANK and not paths & taken:
            slots.append(slot)
            taken |= paths
    if not slots:
        kinds = sorted({s.kind for s in problem.space})
        raise ConfigError(
            f"this method gives out ranks of {' or '.join(LOW_RANK)}, and the kinds are "
            f"{', '.join(kinds)}; add lora to kinds."
        )
    return tuple(slots)


def rank_rows(slots: Sequence[Slot], unit: str) -> dict[str, Sequence[int]]:
    """Slot id -> what rank 0, 1, ... costs, up to the smaller width of its layers."""
    rows: dict[str, Sequence[int]] = {}
    for slot in slots:
        one, two = (slot_cost(slot, n, unit) for n in (1, 2))
        most = min(MAX_SIZE, *(d for site in slot.sites for d in (site.d_in, site.d_out)))
        rows[slot.id] = [0, *(one + n * (two - one) for n in range(most))]
    return rows
