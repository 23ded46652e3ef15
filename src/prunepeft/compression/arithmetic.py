"""Arithmetic on compressed task vectors: on the bit masks, or block by block."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from prunepeft.compression.vectors import (
    TernaryVector,
    Vector,
    check_same_size,
    chunks,
    count_bits,
)
from prunepeft.errors import ConfigError


def overlap(a: TernaryVector, b: TernaryVector) -> int:
    """Entries with the same sign minus entries with opposite signs; the dot product of the signs.

    |p1 & p2| + |n1 & n2| - |p1 & n2| - |n1 & p2|, bits counted.
    """
    check_same_size((a, b))
    same = count_bits(a.positive & b.positive) + count_bits(a.negative & b.negative)
    return same - count_bits(a.positive & b.negative) - count_bits(a.negative & b.positive)


def dot(a: TernaryVector, b: TernaryVector) -> float:
    """Dot product of two task vectors."""
    return a.scale * b.scale * overlap(a, b)


def norm(a: TernaryVector, order: int = 2) -> float:
    """Norm of a task vector, order 1 or 2."""
    if order not in (1, 2):
        raise ConfigError(f"order must be 1 or 2; got {order!r}.")
    return abs(a.scale) * (a.n_kept if order == 1 else math.sqrt(a.n_kept))


def cosine(a: TernaryVector, b: TernaryVector) -> float:
    """Cosine of two task vectors; 0 if one of them is zero."""
    n = a.n_kept * b.n_kept
    sign = np.sign(a.scale) * np.sign(b.scale)
    return float(sign) * overlap(a, b) / math.sqrt(n) if n else 0.0


def distance(a: TernaryVector, b: TernaryVector) -> int:
    """Bits in which the masks differ: 1 for a sign against 0, 2 for opposite signs."""
    check_same_size((a, b))
    return count_bits(a.positive ^ b.positive) + count_bits(a.negative ^ b.negative)


def weighted_sum(vectors: Sequence[Vector], weights: Sequence[float]) -> np.ndarray:
    """sum_j w_j v_j, (d,) float32: task arithmetic. Vectors are read block by block."""
    size = _check(vectors, weights)
    total = np.zeros(size, np.float32)
    for begin, end in chunks(size):
        for vector, weight in zip(vectors, weights, strict=True):
            total[begin:end] += np.float32(weight) * vector.block(begin, end)
    return total


def ties_merge(vectors: Sequence[Vector], weights: Sequence[float] | None = None) -> np.ndarray:
    """TIES: elect a sign for every entry, then average the vectors that agree with it, (d,).

    The sign is that of sum_j w_j v_j; where this is zero, that of the overall majority of elected
    signs. Zeros have no vote and do not count in the average. Trim the vectors before, see
    `compeft.prune_only`; compressed ones are trimmed already.

    Args:
        vectors: Task vectors of one size.
        weights: How much each counts, positive; default: all the same.
    References:
        TIES-Merging, 2023, arXiv 2306.01708, section 3.
    """
    weights = [1.0] * len(vectors) if weights is None else weights
    size = _check(vectors, weights)
    if any(weight <= 0 for weight in weights):
        raise ConfigError(f"the weights of a TIES merge must be positive; got {list(weights)}.")
    majority = np.sign(sum(int(np.sign(v).sum()) for *_, v in _votes(vectors, weights, size)))
    merged = np.zeros(size, np.float32)
    for begin, end, votes in _votes(vectors, weights, size):
        sign = np.sign(votes)
        sign[sign == 0] = majority
        count = np.zeros(end - begin, np.float32)
        for vector, weight in zip(vectors, weights, strict=True):
            values = vector.block(begin, end)
            agrees = np.float32(weight) * (values * sign > 0)
            merged[begin:end] += agrees * values
            count += agrees
        merged[begin:end] /= np.where(count > 0, count, 1)
    return merged


def _votes(
    vectors: Sequence[Vector], weights: Sequence[float], size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    for begin, end in chunks(size):
        pairs = zip(vectors, weights, strict=True)
        yield begin, end, sum(np.float32(w) * v.block(begin, end) for v, w in pairs)


def _check(vectors: Sequence[Vector], weights: Sequence[float]) -> int:
    if len(vectors) != len(weights) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(
            f"got {len(vectors)} task vectors and the weights {list(weights)}; give one finite "
            "weight for each."
        )
    return check_same_size(vectors)
