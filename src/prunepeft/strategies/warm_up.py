"""The warm-up of PrunePEFT: what each criterion alone would remove, on a few rows."""

from dataclasses import dataclass
from typing import Any

from prunepeft.batches import derive_seed, n_steps
from prunepeft.budget import Fidelity
from prunepeft.evaluate import Scored
from prunepeft.strategies.base import Problem, SearchResult

MAX_TURNS = 3
REMOVED = 3 / 16  # share of the modules that a criterion removes in all turns together
MAX_SHARE = 0.1  # of the training's steps that the warm-up takes, if the turns are not given


@dataclass(frozen=True)
class WarmUp:
    """Each criterion alone does a few turns: train, remove the least salient modules.

    Attributes:
        criteria: Names of the candidates.
        rows: Rows of a turn, stratified by label.
        epochs: Passes over them.
        turns: How many; None: as many of three as take at most a tenth of the training's steps, at
            least one. In all turns together a criterion removes three sixteenths of the modules.
    """

    criteria: tuple[str, ...]
    rows: int
    epochs: int
    turns: int | None = None

    def n_turns(self, problem: Problem) -> int:
        """Turns that are done."""
        if self.turns is not None:
            return self.turns
        if not problem.train_steps:
            return MAX_TURNS
        fitting = [t for t in range(1, MAX_TURNS + 1) if self._fits(problem, t)]
        return max(fitting, default=1)

    def most_runs(self, turns: int) -> int:
        """Runs at most: the first turn is one for all criteria."""
        return 1 + (turns - 1) * len(self.criteria)

    def n_rows(self, problem: Problem) -> int:
        """Rows of a run."""
        return min(max(self.rows, problem.n_classes), problem.n_train)

    def steps(self, problem: Problem, turns: int) -> int:
        """Optimiser steps at most."""
        per_run = n_steps(self.n_rows(problem), problem.batch_size) * self.epochs
        return self.most_runs(turns) * per_run

    def run(self, problem: Problem, result: SearchResult) -> dict[str, list[str]]:
        """Modules that each criterion removes, in order; the log goes to the result's history.

        Criteria that have removed the same modules so far train the same model on the same data
        with the same seed, so they share that run: in the first turn all of them do.
        """
        full, turns = problem.space.full(), self.n_turns(problem)
        per_turn = max(1, round(len(full) * REMOVED / turns))
        fidelity = Fidelity(min(1.0, self.rows / problem.n_train), self.epochs)
        removed: dict[str, list[str]] = {c: [] for c in self.criteria}
        log: dict[str, Any] = {"turns": [], "runs": 0, "runs_unshared": 0}
        for turn in range(1, turns + 1):
            runs: dict[frozenset[str], Scored] = {}
            for criterion in self.criteria:
                gone = frozenset(removed[criterion])
                if len(full) - len(gone) <= per_turn:
                    continue
                log["runs_unshared"] += 1
                if gone not in runs:
                    seed = derive_seed(problem.seed, "warmup", turn)
                    runs[gone] = problem.evaluator.score(
                        full.without(gone),
                        self.criteria,
                        name=f"warm-up turn {turn}/{turns}, run {len(runs) + 1}",
                        fidelity=fidelity,
                        seed=seed,
                        init_seed=seed,
                    )
                    log["runs"] += 1
                    result.add(runs[gone])
                scores = runs[gone].saliency[criterion]
                taken = sorted(scores, key=lambda i: scores[i])[:per_turn]
                removed[criterion] += taken
                log["turns"].append(
                    {"turn": turn, "criterion": criterion, "removed": taken, "run": runs[gone].key}
                )
        result.history["warmup"] = log
        problem.on_event("warmup", runs=log["runs"], runs_unshared=log["runs_unshared"])
        return removed

    def _fits(self, problem: Problem, turns: int) -> bool:
        return self.steps(problem, turns) <= MAX_SHARE * problem.train_steps
