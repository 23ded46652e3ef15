"""When a ranking has settled: the modules of a round come out as they did at half its steps."""

import statistics
from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata

from prunepeft.errors import ConfigError

CHECKS = 16  # in an epoch
LEAST_STEPS = 4  # between two checks
FIRST = 4  # checks before the first decision: a quarter of the epoch


class Settling:
    """Compares the rankings of a round with those at half as many steps.

    Statistics are sums over the steps, so neighbouring rankings are alike by construction; half the
    steps say what the other half have changed. Settled is a round whose rank correlation of the two
    (Spearman's, the median over the criteria) reaches the threshold, after a quarter of its steps
    or more. The median, since a criterion may be equal for nearly all modules, or noise.

    Args:
        threshold: Least correlation, in (0, 1]; None: never settled.
        steps: Steps of the whole round.
    Raises:
        ConfigError: if the threshold is not in (0, 1].
    """

    def __init__(self, threshold: float | None, steps: int) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ConfigError(f"settle is a rank correlation in (0, 1], or null; got {threshold}.")
        self.threshold = threshold
        self.every = max(LEAST_STEPS, steps // CHECKS)
        self._checks: list[Mapping[str, Mapping[str, float]]] = []

    def is_due(self, step: int) -> bool:
        """Whether the ranking after this step is looked at."""
        return self.threshold is not None and step % self.every == 0

    def add(self, saliency: Mapping[str, Mapping[str, float]]) -> bool:
        """Look at a ranking; returns whether it has settled.

        Args:
            saliency: Criterion -> unit -> saliency.
        """
        self._checks.append(saliency)
        n = len(self._checks)
        return n >= FIRST and agreement(saliency, self._checks[n // 2 - 1]) >= self.threshold


def agreement(
    now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]]
) -> float:
    """Median over the criteria of the rank correlation of the same units.

    Example:
        >>> agreement({"snip": {"a": 1, "b": 2, "c": 3}}, {"snip": {"a": 1, "b": 5, "c": 4}})
        0.5
    """
    return statistics.median(
        rank_correlation(list(values.values()), [before[name][unit] for unit in values])
        for name, values in now.items()
    )


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation; 1 if both say nothing, 0 if one does."""
    ranks = [rankdata(values) for values in (a, b)]
    flat = [bool(np.ptp(r) == 0) for r in ranks]
    if any(flat):
        return float(all(flat))
    return round(float(np.corrcoef(*ranks)[0, 1]), 12)
