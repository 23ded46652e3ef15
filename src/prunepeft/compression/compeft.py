"""ComPEFT: a task vector as a sparse vector of signs and one scale. No retraining."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prunepeft.compression.vectors import TernaryVector, chunks
from prunepeft.errors import CheckpointError, ConfigError

# The paper's grid, in fractions; 45 pairs.
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
METHODS = ("compeft", "stc")


def compress(
    tau: np.ndarray, density: float, alpha: float = 1.0, method: str = "compeft"
) -> TernaryVector:
    """Replace a task vector by `scale * sign` on its largest entries and 0 elsewhere.

    `compeft` (arXiv 2311.13171, algorithm 1) has the scale `alpha * sigma`, sigma over the whole
    dense vector. `stc` (the paper's baseline) has `alpha` times the mean magnitude of what is kept.
    The released code averages the signed values there, which nearly cancel.

    Args:
        tau: Fine-tuned minus starting values, (d,), finite.
        density: Share of the entries that are kept, in (0, 1].
        alpha: Factor of the scale, not negative. 0 gives a vector of zeros.
        method: `compeft` or `stc`.
    """
    check_settings(density, alpha, method)
    tau = _as_vector(tau)
    signs = sparsify(tau, density)
    unit = spread(tau) if method == "compeft" else mean_magnitude(tau, signs)
    return TernaryVector.from_signs(signs, float(np.float32(alpha * unit)))


def sparsify(tau: np.ndarray, density: float) -> np.ndarray:
    """Signs of the `round(density * d)` entries of largest magnitude, 0 elsewhere: (d,) int8.

    The count is exact; of equal magnitudes the first in the vector are kept. (The released code
    keeps one more, and every tie.) A kept entry that is 0 has no sign, so it goes.
    """
    check_settings(density)
    tau = _as_vector(tau)
    n_keep = round(density * tau.size)
    signs = np.zeros(tau.size, np.int8)
    if n_keep == 0:
        return signs
    threshold, n_above = _threshold(tau, n_keep)
    ties_left = n_keep - n_above
    for begin, end in chunks(tau.size):
        bits = _magnitude_bits(tau[begin:end])
        keep = bits > threshold
        if ties_left:
            ties = np.flatnonzero(bits == threshold)[:ties_left]
            keep[ties] = True
            ties_left -= ties.size
        values = tau[begin:end]
        signs[begin:end] = (values > 0) & keep
        signs[begin:end] -= (values < 0) & keep
    return signs


def prune_only(tau: np.ndarray, density: float) -> np.ndarray:
    """The paper's other baseline: kept entries with their full values, 0 elsewhere, (d,)."""
    tau = _as_vector(tau)
    return np.where(sparsify(tau, density) != 0, tau, np.float32(0))


def spread(tau: np.ndarray) -> float:
    """Unbiased standard deviation over all entries; of a single entry its magnitude."""
    if tau.size < 2:
        return float(abs(tau[0])) if tau.size else 0.0
    mean = sum(float(tau[a:b].sum(dtype=np.float64)) for a, b in chunks(tau.size)) / tau.size
    square = sum(
        float(np.square(tau[a:b].astype(np.float64) - mean).sum()) for a, b in chunks(tau.size)
    )
    return math.sqrt(square / (tau.size - 1))


def mean_magnitude(tau: np.ndarray, signs: np.ndarray) -> float:
    """Mean magnitude of the kept entries; over sigma it is the alpha closest to tau."""
    total = sum(
        float(np.abs(tau[a:b]).sum(dtype=np.float64, where=signs[a:b] != 0))
        for a, b in chunks(tau.size)
    )
    return total / max(1, int(np.count_nonzero(signs)))


@dataclass(frozen=True)
class Choice:
    """One pair of the grid and what it scored."""

    density: float
    alpha: float
    value: float


def grid_search(
    evaluate: Callable[[float, float], float],
    *,
    greater_is_better: bool,
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
) -> tuple[Choice, list[Choice]]:
    """Try every pair; of equally good ones the smallest file wins, then the smallest alpha.

    Args:
        evaluate: (density, alpha) -> validation metric.
        greater_is_better: Direction of the metric.
        densities: Shares to try.
        alphas: Factors to try.
    Returns:
        The best pair, and all in the order tried.
    Raises:
        ConfigError: if there is nothing to try, or no pair gives a finite value.
    """
    pairs = [(k, a) for k in sorted(densities) for a in sorted(alphas)]
    for density, alpha in pairs:
        check_settings(density, alpha)
    tried = [Choice(k, a, float(evaluate(k, a))) for k, a in pairs]
    sound = [choice for choice in tried if math.isfinite(choice.value)]
    if not sound:
        raise ConfigError(
            f"none of {len(pairs)} pairs of density and alpha gives a finite metric; try smaller "
            "alphas, or check the adapter and the data."
        )
    sign = 1.0 if greater_is_better else -1.0
    return max(sound, key=lambda choice: sign * choice.value), tried


def check_settings(density: float, alpha: float = 1.0, method: str = "compeft") -> None:
    """Raise ConfigError for a setting that is not allowed."""
    if not _is_number(density) or not 0 < density <= 1:
        raise ConfigError(
            f"density must be a share in (0, 1]; got {density!r}. 10% is 0.1, and 1 keeps all."
        )
    if not _is_number(alpha) or not 0 <= alpha <= 1e6:
        raise ConfigError(f"alpha must be a number in [0, 1e6]; got {alpha!r}.")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_vector(tau: np.ndarray) -> np.ndarray:
    vector = np.ascontiguousarray(tau, np.float32)
    if vector.ndim != 1:
        raise ConfigError(f"a task vector has one axis; got shape {vector.shape}. Flatten it.")
    for begin, end in chunks(vector.size):
        if not np.isfinite(vector[begin:end]).all():
            raise CheckpointError(
                "the task vector holds NaN or infinite values; the adapter is damaged or its "
                "training diverged. Take another checkpoint."
            )
    return vector


def _magnitude_bits(values: np.ndarray) -> np.ndarray:
    """Magnitudes as whole numbers of the same order: the bits of a positive float sort like it."""
    return np.abs(values).view(np.uint32)


def _threshold(tau: np.ndarray, n_keep: int) -> tuple[int, int]:
    """Bits of the `n_keep`-th largest magnitude, and how many are larger.

    Two histograms of 16 bits each: linear time, and memory for one chunk.
    """
    high = _histogram(_magnitude_bits(tau[a:b]) >> 16 for a, b in chunks(tau.size))
    top, above = _from_above(high, n_keep)
    low = _histogram(
        bits[bits >> 16 == top] & 0xFFFF
        for bits in (_magnitude_bits(tau[a:b]) for a, b in chunks(tau.size))
    )
    rest, above_low = _from_above(low, n_keep - above)
    return (top << 16) | rest, above + above_low


def _histogram(parts: Iterable[np.ndarray] | Iterator[np.ndarray]) -> np.ndarray:
    counts = np.zeros(1 << 16, np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=1 << 16)
    return counts


def _from_above(counts: np.ndarray, n: int) -> tuple[int, int]:
    """The bin that holds the n-th largest, and how many lie in higher bins."""
    down = np.cumsum(counts[::-1])
    place = int(np.searchsorted(down, n))
    return counts.size - 1 - place, int(down[place - 1]) if place else 0
