"""Black-box search: train one placement after another for a short while, and keep the best.

A strategy says which placements to try next, and nothing else; one loop runs the trials, records
them, goes on when one fails, and ends at the number of trials or of optimiser steps.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from prunepeft.budget import Fidelity
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.space import Placement
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.choices import Choices, Vector
from prunepeft.training import derive_seed

Stages = tuple[tuple[int, Fidelity], ...]


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
        choices: The placements within the budget.
        greater_is_better: Direction of the metric.
        trials: All trials so far, in order.
        stage: Index of the stage that is under way.
    """

    choices: Choices
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


@dataclass(frozen=True)
class BlackBox(Strategy):
    """Base of the strategies that only propose.

    All trials have the same seed: the same rows in the same order, and the same first values of a
    module, so that they differ by their placement alone.

    Attributes:
        n_trials: Placements tried.
        fidelity: Share of the training rows that a trial sees.
        epochs: Passes over them.
        max_steps: Optimiser steps of all trials together; None: as many as they need.
    """

    section: ClassVar[str] = "black_box"

    n_trials: int = 27
    fidelity: float = 1.0
    epochs: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        Fidelity(self.fidelity, self.epochs)
        at_least("n_trials", self.n_trials, 1)
        if self.max_steps is not None:
            at_least("max_steps", self.max_steps, 1)

    @abstractmethod
    def propose(self, history: History, n: int, generator: torch.Generator) -> list[Placement]:
        """Placements to try next, each within the budget.

        Args:
            history: Everything known so far.
            n: How many are missing in this stage; fewer may be proposed, and if there are none
                the stage is over.
            generator: Of everything random.
        """

    def stages(self, problem: Problem) -> Stages:
        """How many trials of which fidelity, one stage after the other."""
        return ((self.n_trials, Fidelity(self.fidelity, self.epochs)),)

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: the budget, and steps for one trial at least."""
        problem.check(smallest=True)
        need = min(problem.n_steps(fidelity) for _, fidelity in self.stages(problem))
        if self.max_steps is not None and need > self.max_steps:
            raise ConfigError(
                f"black_box.max_steps={self.max_steps:,} is less than the {need:,} steps of one "
                "trial; raise it, or lower black_box.fidelity or black_box.epochs."
            )

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. If all candidates fit the budget, nothing is tried.

        Raises:
            StateError: if every trial failed.
        """
        self.check(problem)
        full = problem.space.full()
        choices = Choices.of(problem.space, problem.limit, problem.unit)
        history = History(choices, problem.greater_is_better)
        result = SearchResult(full)
        if problem.cost(full) > problem.limit:
            for stage, (n, fidelity) in enumerate(self.stages(problem)):
                history = self._stage(problem, replace(history, stage=stage), n, fidelity, result)
            if not history.judged():
                raise StateError(
                    f"all {len(history.trials)} trials failed; the last one with: "
                    f"{history.trials[-1].error}"
                )
            result.placement = history.judged()[0].placement
        result.history = self._record(problem, history)
        return result

    def _stage(
        self, problem: Problem, history: History, n: int, fidelity: Fidelity, result: SearchResult
    ) -> History:
        """Run trials until the stage has `n`, nothing more is proposed, or no steps are left."""
        while (missing := n - len(history.at(history.stage))) > 0:
            seed = derive_seed(problem.seed, self.name, len(history.trials))
            generator = torch.Generator().manual_seed(seed)
            proposed = self.propose(history, missing, generator)[:missing]
            for placement in proposed:
                steps = result.steps + problem.n_steps(fidelity)
                if self.max_steps is not None and steps > self.max_steps:
                    return history
                trial = self._try(problem, history, placement, fidelity, result)
                history = replace(history, trials=(*history.trials, trial))
            if not proposed:
                break
        return history

    def _try(
        self,
        problem: Problem,
        history: History,
        placement: Placement,
        fidelity: Fidelity,
        result: SearchResult,
    ) -> Trial:
        """Run one trial and count its cost."""
        number, cost = len(history.trials) + 1, problem.cost(placement)
        if not len(placement) or cost > problem.limit:
            raise BudgetError(
                f"method {self.name} proposed {len(placement)} modules of {cost:,} {problem.unit}; "
                f"it must propose at least one, within the budget of {problem.limit:,}."
            )
        tried = problem.evaluator.trial(
            placement,
            name=f"trial {number}",
            fidelity=fidelity,
            seed=derive_seed(problem.seed, "trial"),
        )
        result.add(tried)
        metric = None if tried.error else tried.metrics[problem.metric]
        problem.on_event("trial", number=number, metric=metric, cost=cost, error=tried.error)
        return Trial(
            number,
            history.stage,
            placement,
            history.choices.encode(placement),
            cost,
            fidelity,
            metric,
            tried.error,
            tried.seconds,
            tried.steps,
        )

    def _record(self, problem: Problem, history: History) -> dict[str, Any]:
        """What a report needs, as plain JSON values."""
        full = problem.space.full()
        return {
            "mode": self.name,
            "space": full.to_dict(),
            "partitions": {s.id: s.partition for s in full},
            "warmup": None,
            "strategy": {},
            "rounds": [],
            "metric": problem.metric,
            "greater_is_better": problem.greater_is_better,
            "stages": [
                {"trials": n, "fidelity": asdict(fidelity)} for n, fidelity in self.stages(problem)
            ],
            "trials": [t.to_dict() for t in history.trials],
            "best": history.judged()[0].number if history.trials else None,
            "pareto": [t.number for t in history.front()],
        }


def decoded(choices: Choices, vectors: Sequence[Vector]) -> list[Placement]:
    """Placements of these vectors."""
    return [choices.decode(vector) for vector in vectors]


def at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError for a setting that is too small."""
    if value < least:
        raise ConfigError(f"black_box.{name} must be {least} or more; got {value}.")
