"""A strategy turns a problem into a placement. It holds no state: what it did is in its history."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from prunepeft.backends.base import Backend, Serial
from prunepeft.batches import n_steps
from prunepeft.budget import Fidelity
from prunepeft.errors import BudgetError
from prunepeft.evaluate import Evaluator, Scored, Tried
from prunepeft.kinds import cost, slot_cost
from prunepeft.registry import Registry
from prunepeft.space import Placement, SearchSpace
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group


@dataclass(frozen=True)
class Problem:
    """What is asked of a strategy.

    Attributes:
        space: The candidate slots.
        limit: The budget as a whole number.
        unit: What the limit counts: `parameters`, `modules` or `rank`.
        evaluator: Trains and scores placements.
        n_train: Rows of the training split.
        fidelity: Share of full training that one round gets.
        seed: Of everything random.
        on_event: Told of each finished step, `on_event(kind, **fields)`.
        groups: Structures of the base model of which some may go, for methods that prune it.
        metric: Name of the validation metric that decides.
        greater_is_better: Its direction.
        batch_size: Rows of one optimiser step.
        backend: Where independent trials run.
        train_steps: Optimiser steps of the training that follows; 0: not known.
        n_classes: Classes among the training rows; every part of these has a row of each.
    """

    space: SearchSpace
    limit: int
    unit: str
    evaluator: Evaluator
    n_train: int
    fidelity: Fidelity
    seed: int
    on_event: Callable[..., None] = lambda kind, **fields: None
    groups: tuple[Group, ...] = ()
    metric: str = ""
    greater_is_better: bool = True
    batch_size: int = 16
    backend: Backend = field(default_factory=Serial)
    train_steps: int = 0
    n_classes: int = 1

    def cost(self, placement: Placement) -> int:
        """Cost of a placement in the budget's unit."""
        return cost(placement, self.unit)

    def slot_costs(self, *, smallest: bool = False) -> dict[str, int]:
        """Cost of each slot of the space at its largest size, or at its smallest."""
        at = 0 if smallest else -1
        return {s.id: slot_cost(s, s.sizes[at], self.unit) for s in self.space}

    def rows(self, fidelity: Fidelity) -> int:
        """Training rows that are seen at this fidelity."""
        return min(self.n_train, max(fidelity.rows(self.n_train), self.n_classes))

    def n_steps(self, fidelity: Fidelity) -> int:
        """Optimiser steps of a training at this fidelity."""
        return n_steps(self.rows(fidelity), self.batch_size) * fidelity.epochs

    def check(self, *, smallest: bool = False) -> None:
        """Raise BudgetError if even the smallest module is over the limit.

        Args:
            smallest: Whether modules may have their smallest size, not only their largest.
        """
        costs = self.slot_costs(smallest=smallest)
        smallest = min(costs, key=lambda i: costs[i])
        if costs[smallest] > self.limit:
            raise BudgetError(
                f"the smallest module, {smallest}, costs {costs[smallest]:,} {self.unit}, but the "
                f"budget allows {self.limit:,}. Raise --budget or give a smaller size, for example "
                "sizes.lora=1."
            )


@dataclass
class SearchResult:
    """What a strategy found and what it cost.

    Attributes:
        placement: What to train; on the cut base, if there is a cut.
        start: Key of the weights to train on from; empty: first values.
        cut: What stays of the base model; None: all of it.
    """

    placement: Placement
    start: str = ""
    cut: Cut | None = None
    history: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    runs: int = 0
    peak_memory_bytes: int = 0

    def add(self, scored: Scored | Tried) -> None:
        """Count one run into the cost."""
        self.seconds += scored.seconds
        self.steps += scored.steps
        self.runs += 1
        self.peak_memory_bytes = max(self.peak_memory_bytes, scored.peak_memory_bytes)


class Strategy(ABC):
    """A way to search. Hyper-parameters are the fields of a frozen dataclass.

    Class attributes:
        name: Registered name.
        section: Section of the configuration whose keys are its fields.
        cuts_base: Whether it takes heads and neurons out of the base model itself.
        needs_whole_base: Whether it works on the base model in other ways than forward and backward
            passes with modules on it, which are all that can be done if every process has a part.
        has_trials: Whether it trains placements that do not depend on each other.
        reads_gradients: Whether it needs gradients of frozen weights, which quantised ones lack.
        reads_search: Settings of section `search` that it reads, beside its fields.
    """

    name: ClassVar[str]
    section: ClassVar[str] = "search"
    cuts_base: ClassVar[bool] = False
    needs_whole_base: ClassVar[bool] = False
    has_trials: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False
    reads_search: ClassVar[frozenset[str]] = frozenset({"fidelity", "epochs", "lr"})

    def default_share(self, problem: Problem) -> float:
        """Share of the training rows that the search sees, if the settings name none."""
        return 1.0

    def check(self, problem: Problem) -> None:
        """Raise an error if it is clear before any training that the search must fail."""
        problem.check()

    @abstractmethod
    def search(self, problem: Problem) -> SearchResult:
        """Find a placement within the budget.

        Raises:
            BudgetError: if no placement is.
        """


METHODS: Registry[type[Strategy]] = Registry("method")
