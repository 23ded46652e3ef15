"""Paired tests of one method against another, seed by seed; numbers in, numbers out.

What cannot be known is None: no interval from one pair, no test where all differences are equal.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
WILCOXON_PAIRS = 6  # with fewer, even differences of one sign give p > 0.05
_SAME = 1e-12  # differences that differ by less are rounding


@dataclass(frozen=True)
class Paired:
    """Differences of pairs.

    Attributes:
        n: Pairs.
        mean: Mean difference; None without pairs.
        low, high: 95 % confidence interval of the mean, by Student's t.
        p: Two-sided p-value of the paired t-test.
        p_wilcoxon: That of the exact signed-rank test, from six pairs on.
        note: Why something is missing.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_wilcoxon: float | None = None
    note: str = ""


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation and number; None where there are too few values.

    Example:
        >>> summary([0.8])
        {'mean': 0.8, 'std': None, 'n': 1}
    """
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def paired(differences: Sequence[float]) -> Paired:
    """Test whether the mean of differences is zero.

    Differences that are all equal have no spread to judge them by: zeros give p = 1, others give
    no p at all, however large they are.

    Example:
        >>> found = paired([0.01, 0.02, 0.03])
        >>> round(found.mean, 4), round(found.low, 4), round(found.high, 4), round(found.p, 4)
        (0.02, -0.0048, 0.0448, 0.0742)
    """
    n = len(differences)
    if n == 0:
        return Paired(0, note="no common seed")
    mean = statistics.fmean(differences)
    if n == 1:
        return Paired(1, mean, note="one seed: no interval and no test")
    spread = statistics.stdev(differences)
    if spread <= _SAME * max(1.0, *map(abs, differences)):
        if abs(mean) <= _SAME:
            return Paired(n, 0.0, 0.0, 0.0, 1.0, signed_rank(differences), "equal on every seed")
        note = "the same difference on every seed: no spread, so no interval and no test"
        return Paired(n, mean, p_wilcoxon=signed_rank(differences), note=note)
    error = spread / math.sqrt(n)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, mean - reach, mean + reach, p, signed_rank(differences))


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test, exact also with ties; None below six pairs.

    Zeros are left out, and ties share their mean rank. The sum of the ranks of one sign is compared
    with all 2^n ways to choose signs.

    Example:
        >>> signed_rank([1, 2, 3, 4, 5, 6]), signed_rank([1, 2, 3])
        (0.03125, None)
    """
    if len(differences) < WILCOXON_PAIRS:
        return None
    values = [d for d in differences if abs(d) > _SAME]
    # Twice the mean ranks, so that they are whole; equal up to rounding are ties.
    doubled = [round(2 * r) for r in stats.rankdata([round(abs(d), 12) for d in values])]
    ways = Counter({0: 1})
    for rank in doubled:
        for total, count in list(ways.items()):
            ways[total + rank] += count
    up = sum(r for r, d in zip(doubled, values, strict=True) if d > 0)
    low = min(up, sum(doubled) - up)
    tail = sum(count for total, count in ways.items() if total <= low)
    return min(1.0, 2 * tail / 2 ** len(values))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's correction over all tests that could be made.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': None, 'd': 0.06}
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(p_values)
    reached = 0.0
    for i, (p, name) in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - i) * p))
        found[name] = reached
    return found


def verdict(difference: Paired, p: float | None, *, greater_is_better: bool) -> str:
    """`ahead`, `behind` or `no difference shown`, at 5 % after correction."""
    if difference.mean is None or p is None or p >= 1 - CONFIDENCE:
        return "no difference shown"
    return "ahead" if (difference.mean > 0) == greater_is_better else "behind"
