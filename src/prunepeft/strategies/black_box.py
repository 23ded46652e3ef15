"""Black-box search: train one placement after another for a short while, and keep the best.

A strategy says which placements to try next, and nothing else; one loop runs the trials, records
them, goes on when one fails, and ends at the number of trials or of optimiser steps.
"""

import contextlib
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from prunepeft.backends.base import Batch
from prunepeft.batches import derive_seed
from prunepeft.budget import Fidelity
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.evaluate import Tried
from prunepeft.space import Placement, SearchSpace
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.choices import Choices, Coding, Vector
from prunepeft.strategies.history import History, Trial

Stages = tuple[tuple[int, Fidelity], ...]


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
    has_trials: ClassVar[bool] = True
    reads_search: ClassVar[frozenset[str]] = frozenset({"lr"})

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

    def candidates(self, problem: Problem) -> SearchSpace:
        """The slots and sizes that are searched: those that were asked for."""
        return problem.space

    def widened(self, problem: Problem) -> Problem:
        """The problem with `candidates` for its space."""
        return replace(problem, space=self.candidates(problem))

    def choices(self, problem: Problem) -> Coding:
        """How the placements of the problem's space are coded: slot by slot."""
        return Choices.of(problem.space, problem.limit, problem.unit)

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: the budget, and steps for one trial at least."""
        self.widened(problem).check(smallest=True)
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
        problem = self.widened(problem)
        full = problem.space.full()
        history = History(self.choices(problem), problem.greater_is_better)
        result = SearchResult(full)
        if problem.cost(full) > problem.limit:
            for stage, (n, fidelity) in enumerate(self.stages(problem)):
                history = self._stage(problem, replace(history, stage=stage), n, fidelity, result)
            if not history.trials:
                raise StateError(f"method {self.name} proposed no placement to try.")
            if not history.judged():
                raise StateError(
                    f"all {len(history.trials)} trials failed; the last one with: "
                    f"{history.trials[-1].error}. A failed trial is not run again when a run "
                    "resumes: put that right and start it with --overwrite."
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
            began = time.perf_counter()
            proposed = self.propose(history, missing, generator)[:missing]
            result.seconds += time.perf_counter() - began
            before = len(history.trials)
            history = self._try(problem, history, proposed, fidelity, result)
            if not proposed or len(history.trials) < before + len(proposed):
                break
        return history

    def _try(
        self,
        problem: Problem,
        history: History,
        placements: Sequence[Placement],
        fidelity: Fidelity,
        result: SearchResult,
    ) -> History:
        """Run trials, side by side where the backend can, and count their cost."""
        for placement in placements:
            self._check_proposal(problem, placement)
        first, steps = len(history.trials) + 1, problem.n_steps(fidelity)
        if self.max_steps is not None:
            placements = placements[: max(0, self.max_steps - result.steps) // steps]
        batch = Batch(
            placements,
            names=[f"trial {first + i}" for i in range(len(placements))],
            fidelity=fidelity,
            seed=derive_seed(problem.seed, "trial"),
            steps=steps,
        )
        with contextlib.closing(problem.backend.trials(problem.evaluator, batch)) as tries:
            for placement in placements:
                if self.max_steps is not None and result.steps + steps > self.max_steps:
                    break
                history = self._count(problem, history, placement, fidelity, next(tries), result)
        return history

    def _count(
        self,
        problem: Problem,
        history: History,
        placement: Placement,
        fidelity: Fidelity,
        tried: Tried,
        result: SearchResult,
    ) -> History:
        """Add a trial to the history, and its cost to that of the search."""
        result.add(tried)
        metric = None if tried.error else tried.metrics[problem.metric]
        number, cost = len(history.trials) + 1, problem.cost(placement)
        problem.on_event("trial", number=number, metric=metric, cost=cost, error=tried.error)
        vector = history.choices.encode(placement)
        taken = (tried.error, tried.seconds, tried.steps)
        trial = Trial(number, history.stage, placement, vector, cost, fidelity, metric, *taken)
        return replace(history, trials=(*history.trials, trial))

    def _check_proposal(self, problem: Problem, placement: Placement) -> None:
        cost = problem.cost(placement)
        if not len(placement) or cost > problem.limit:
            raise BudgetError(
                f"method {self.name} proposed {len(placement)} modules of {cost:,} {problem.unit}; "
                f"it must propose at least one, within the budget of {problem.limit:,}."
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


def decoded(choices: Coding, vectors: Sequence[Vector]) -> list[Placement]:
    """Placements of these vectors."""
    return [choices.decode(vector) for vector in vectors]


def at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError for a setting that is too small."""
    if value < least:
        raise ConfigError(f"black_box.{name} must be {least} or more; got {value}.")
