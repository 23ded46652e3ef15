"""AutoPEFT: Bayesian optimisation of metric and cost over which layers, which kinds, which sizes.

try random placements; then, a few at a time:
    a Gaussian process of the metric, with a prior that lets few variables count
    the placements whose results are expected to push the front out farthest
keep the front of metric and cost; train the best one
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prunepeft.errors import BudgetError, ConfigError
from prunepeft.pareto import Point, hypervolume, reference_point
from prunepeft.processes import on_main
from prunepeft.space import Placement, SearchSpace
from prunepeft.strategies import bayesian
from prunepeft.strategies.base import Problem
from prunepeft.strategies.black_box import BlackBox, at_least, decoded
from prunepeft.strategies.history import History, Trial
from prunepeft.strategies.layer_space import LayerSpace, widened

COST_AT_REFERENCE = -110.0  # percent of the limit, and a margin


@dataclass(frozen=True)
class AutoPeft(BlackBox):
    """Multi-objective Bayesian optimisation with a sparse prior.

    A placement is: which layers have modules, and for each kind one size, the same in all those
    layers, see `LayerSpace`. The first objective is the cost, the second the metric. Each trial is
    a training of its own; nothing is shared between them.

    Attributes:
        initial: Random placements at the start; None: a third of `n_trials`, at least 2.
        batch: Placements proposed from one surrogate.
        surrogate: `map-saas`, `nuts` or `gp`, see `bayesian.fit`.
    References:
        AutoPEFT, TACL 2024, arXiv 2301.12132 (200 trials, 100 of them random, batches of 4); the
        prior: Eriksson and Jankowiak, 2021, arXiv 2103.00048. Differs from it: the budget is a
        hard limit, so costs are known and counted on the modules that would be trained (all of
        their tensors), and only the metric has a surrogate; the reference point lies at 110 % of
        the budget and below the front of the first random trials, so that any metric can be used.
        Differs from released code: a placement is always the decoded vector, and the vector that
        the surrogate learns from is encoded back from the placement that was trained (there, the
        point that was optimised and the one that was trained are not the same); a neighbour
        differs from its point in one variable (there, neighbours are mutated on and on); no
        placement is tried twice; all draws come from the seed, and loops of draws end; ranks are
        in the middle of their step; a failed trial or fit does not end the search; the metric is
        that at the end of a trial, not the best of its epochs. There are no processes of their own
        and no command line to parse, so those errors cannot occur.
    """

    name: ClassVar[str] = "autopeft"

    initial: int | None = None
    batch: int = 4
    surrogate: str = "map-saas"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("batch", self.batch, 1)
        if self.surrogate not in bayesian.NEEDS:
            raise ConfigError(
                f"black_box.surrogate {self.surrogate!r} is unknown; use "
                f"{', '.join(bayesian.NEEDS)}."
            )
        if self.initial is not None:
            at_least("initial", self.initial, 2)
            if self.initial > self.n_trials:
                raise ConfigError(
                    f"black_box.initial={self.initial} random trials are more than the "
                    f"{self.n_trials} of the search; raise black_box.n_trials."
                )

    @property
    def n_initial(self) -> int:
        """Random placements at the start."""
        return max(2, self.n_trials // 3) if self.initial is None else self.initial

    def candidates(self, problem: Problem) -> SearchSpace:
        """See `BlackBox.candidates`: more sizes."""
        return widened(problem.space, problem.limit, problem.unit)

    def choices(self, problem: Problem) -> LayerSpace:
        """See `BlackBox.choices`: layers and kinds, not single slots."""
        return LayerSpace.of(problem.space, problem.limit, problem.unit)

    def check(self, problem: Problem) -> None:
        """See `BlackBox.check`: also that BoTorch is there, and that one layer fits the budget."""
        bayesian.require(self.surrogate)
        super().check(problem)
        space = self.choices(self.widened(problem))
        if (least := space.cost(space.smallest())) > problem.limit:
            raise BudgetError(
                f"the smallest placement of method autopeft, one kind at its smallest size in one "
                f"layer, costs {least:,} {problem.unit}, but the budget allows "
                f"{problem.limit:,}. Raise --budget, or give smaller sizes or fewer roles."
            )

    def propose(self, history: History, n: int, generator: torch.Generator) -> list[Placement]:
        """See `BlackBox.propose`. After the random ones, `batch` at a time."""
        space, known = history.choices, history.known()
        missing = self.n_initial - len(history.trials)
        done = history.judged()
        if missing > 0 or len(done) < 2:
            n = min(n, missing if missing > 0 else self.batch)
            return decoded(space, space.draw_new(n, known, generator))
        observed = {t.vector: point(t, history) for t in done}
        reference = self.reference(history)
        n = min(n, self.batch)
        arguments = (space, observed, known, reference, n, self.surrogate, generator)
        return decoded(space, on_main(lambda: bayesian.suggest(*arguments)))

    def reference(self, history: History) -> Point:
        """Reference point of the hypervolume, from the first random trials.

        The metric is the worst on their front, less a tenth of the front's range. If all of them
        failed, the first trial that did not fail counts.
        """
        done = [t for t in history.trials if t.metric is not None]
        first = [t for t in done if t.number <= self.n_initial] or done[:1]
        return COST_AT_REFERENCE, reference_point([point(t, history) for t in first])[1]

    def _record(self, problem: Problem, history: History) -> dict[str, Any]:
        """As that of `BlackBox`, with the vectors, the reference and the hypervolume by trial."""
        record = super()._record(problem, history)
        record["variables"] = list(history.choices.names)
        record["vectors"] = [list(t.vector) for t in history.trials]
        if history.trials:
            record["reference"] = list(self.reference(history))
            record["hypervolume"] = self._volumes(history)
        return record

    def _volumes(self, history: History) -> list[float]:
        """Hypervolume after each trial, in percent of the limit times units of the metric."""
        reference, seen, volumes = self.reference(history), [], []
        for trial in history.trials:
            seen += [] if trial.metric is None else [point(trial, history)]
            volumes.append(hypervolume(seen, reference))
        return volumes


def point(trial: Trial, history: History) -> Point:
    """Both objectives of a trial that did not fail, each better when larger."""
    sign = 1 if history.greater_is_better else -1
    return bayesian.percent(trial.cost, history.choices.limit), sign * trial.metric
