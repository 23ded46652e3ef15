"""Successive halving: many placements on few rows, the better ones again on more rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunepeft.budget import Fidelity
from prunepeft.space import Placement
from prunepeft.strategies.base import Problem
from prunepeft.strategies.black_box import BlackBox, Stages, at_least, decoded
from prunepeft.strategies.history import History


@dataclass(frozen=True)
class SuccessiveHalving(BlackBox):
    """One bracket of successive halving over random placements.

    `n_trials` placements are tried in the first rung, n_trials / eta of them, the best, in the
    second, and so on (rounded down). The last rung sees the share `fidelity` of the rows, each one
    before it 1 / eta of the next. A rung has a full batch of rows at least, else there are fewer
    rungs. With `max_steps` the first rung is as large as the whole bracket can pay for.

    Attributes:
        eta: One in so many goes on to the next rung.
    References:
        Jamieson and Talwalkar, 2016, arXiv 1502.07943 (successive halving); Li et al., 2020, ASHA,
        arXiv 1810.05934, algorithm 1. Differs from ASHA: a rung is finished before the next one
        starts, so that the result does not depend on which trial ends first; nobody is promoted on
        a half-filled rung.
    """

    name: ClassVar[str] = "asha"

    eta: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("eta", self.eta, 2)

    def stages(self, problem: Problem) -> Stages:
        """The rungs: how many trials of which fidelity."""
        for n in range(self.n_trials, 0, -1):
            rungs = self._bracket(problem, n)
            steps = sum(k * problem.n_steps(fidelity) for k, fidelity in rungs)
            if self.max_steps is None or steps <= self.max_steps:
                break
        return rungs

    def _bracket(self, problem: Problem, n: int) -> Stages:
        """The rungs of a bracket of `n` placements."""

        def share(times: int) -> Fidelity:
            return Fidelity(self.fidelity / self.eta**times, self.epochs)

        top = 0
        while n >= self.eta ** (top + 1) and (
            share(top + 1).rows(problem.n_train) >= max(problem.batch_size, problem.n_classes)
        ):
            top += 1
        return tuple((n // self.eta**k, share(top - k)) for k in range(top + 1))

    def propose(self, history: History, n: int, generator: torch.Generator) -> list[Placement]:
        """See `BlackBox.propose`. A rung is proposed as a whole."""
        choices = history.choices
        if history.stage == 0:
            return decoded(choices, choices.draw_new(n, history.known(), generator))
        if history.at(history.stage):
            return []
        below = history.at(history.stage - 1)
        best = history.best_first(below)[: max(1, len(below) // self.eta)]
        return [t.placement for t in best[:n]]
