"""What a black-box search knows: its trials so far, and which of them are best."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from prunepeft.budget import Fidelity
from prunepeft.space import Placement
from prunepeft.strategies.choices import Coding, Vector


@dataclass(frozen=True)
class Trial:
    """One placement that was tried.

    Attributes:
        number: From 1, in the order of the search.
        stage: Index of the stage it belongs to.
        placement: What was trained.
        vector: The same as choices.
        cost: In the unit of the budget.
        fidelity: Share of the rows, and passes over them.
        metric: Validation metric at the end; None if the trial failed.
        error: Why it failed.
        seconds, steps: What it took.
    """

    number: int
    stage: int
    placement: Placement
    vector: Vector
    cost: int
    fidelity: Fidelity
    metric: float | None
    error: str = ""
    seconds: float = 0.0
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "number": self.number,
            "stage": self.stage,
            "placement": self.placement.digest,
            "sizes": {slot.id: size for slot, size in self.placement.sizes.items()},
            "cost": self.cost,
            "fidelity": asdict(self.fidelity),
            "status": "ok" if self.metric is not None else "failed",
            "metric": self.metric,
            "error": self.error,
            "seconds": self.seconds,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class History:
    """All that a proposal may depend on.

    Attributes:
        choices: The placements within the budget, and how they are coded.
        greater_is_better: Direction of the metric.
        trials: All trials so far, in order.
        stage: Index of the stage that is under way.
    """

    choices: Coding
    greater_is_better: bool = True
    trials: tuple[Trial, ...] = ()
    stage: int = 0

    def at(self, stage: int) -> list[Trial]:
        """Trials of a stage, in order."""
        return [t for t in self.trials if t.stage == stage]

    def known(self) -> set[Vector]:
        """Vectors of the placements that were tried."""
        return {t.vector for t in self.trials}

    def best_first(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those that did not fail, best metric first; ties: cheaper, then earlier."""
        sign = -1 if self.greater_is_better else 1
        done = [t for t in trials if t.metric is not None]
        return sorted(done, key=lambda t: (sign * t.metric, t.cost, t.number))

    def judged(self) -> list[Trial]:
        """Trials of the last stage in which one succeeded, best first.

        Metrics of different fidelities do not compare.
        """
        last = max((t.stage for t in self.trials if t.metric is not None), default=0)
        return self.best_first(self.at(last))

    def front(self) -> list[Trial]:
        """Of those, the ones that none beats in metric and cost; best metric first."""
        front: list[Trial] = []
        for trial in self.judged():
            if not front or trial.cost < front[-1].cost:
                front.append(trial)
        return front
