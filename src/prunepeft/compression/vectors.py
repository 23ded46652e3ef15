"""Task vectors as they are kept in memory: two bit masks and a scale, or plain numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prunepeft.errors import ConfigError

CHUNK = 1 << 20  # entries worked on at a time; a multiple of 8


class Vector(Protocol):
    """Anything that can hand out its values block by block."""

    @property
    def size(self) -> int:
        """Number of entries."""

    def block(self, begin: int, end: int) -> np.ndarray:
        """Values of the entries from `begin` to `end`, float32."""


@dataclass(frozen=True, eq=False)
class TernaryVector:
    """scale * (positive - negative), with one bit per entry in each mask: d / 4 bytes.

    Attributes:
        positive, negative: Packed masks, (ceil(d / 8),) uint8, first entry in the highest bit.
        size: Number of entries d.
        scale: What an entry of sign 1 stands for.
    """

    positive: np.ndarray
    negative: np.ndarray
    size: int
    scale: float

    @classmethod
    def from_signs(cls, signs: np.ndarray, scale: float) -> "TernaryVector":
        """Pack signs in {-1, 0, 1}, (d,)."""
        return cls(np.packbits(signs > 0), np.packbits(signs < 0), signs.size, scale)

    @property
    def n_kept(self) -> int:
        """Number of entries that are not zero."""
        return count_bits(self.positive) + count_bits(self.negative)

    def signs(self) -> np.ndarray:
        """Signs, (d,) int8."""
        return self.signs_between(0, self.size)

    def signs_between(self, begin: int, end: int) -> np.ndarray:
        """Signs of the entries from `begin` to `end`, int8."""
        first, last = begin // 8, -(-end // 8)
        cut = slice(begin - 8 * first, end - 8 * first)
        positive = np.unpackbits(self.positive[first:last]).view(np.int8)[cut]
        return positive - np.unpackbits(self.negative[first:last]).view(np.int8)[cut]

    def block(self, begin: int, end: int) -> np.ndarray:
        return self.signs_between(begin, end) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class DenseVector:
    """Plain float32 values, (d,)."""

    values: np.ndarray

    @property
    def size(self) -> int:
        return self.values.size

    def block(self, begin: int, end: int) -> np.ndarray:
        return self.values[begin:end]


@dataclass(frozen=True, eq=False)
class Joined:
    """Pieces of vectors, one behind the other, as one vector; nothing is copied.

    Attributes:
        parts: (vector, begin, end) of every piece.
    """

    parts: Sequence[tuple[Vector, int, int]]

    @property
    def size(self) -> int:
        return sum(end - begin for _, begin, end in self.parts)

    def block(self, begin: int, end: int) -> np.ndarray:
        pieces, offset = [np.zeros(0, np.float32)], 0
        for vector, first, last in self.parts:
            low, high = max(begin - offset, 0), min(end - offset, last - first)
            if low < high:
                pieces.append(vector.block(first + low, first + high))
            offset += last - first
        return np.concatenate(pieces)


def chunks(size: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive blocks."""
    return ((begin, min(begin + step, size)) for begin in range(0, size, step))


def to_dense(vector: Vector) -> np.ndarray:
    """All values, (d,) float32."""
    values = np.empty(vector.size, np.float32)
    for begin, end in chunks(vector.size):
        values[begin:end] = vector.block(begin, end)
    return values


def check_same_size(vectors: Sequence[Vector]) -> int:
    """The size all vectors share. Raises ConfigError if they do not, or there are none."""
    sizes = {vector.size for vector in vectors}
    if len(sizes) != 1:
        raise ConfigError(
            f"task vectors must be of one size; got {sorted(sizes) or 'none'}. Only adapters of "
            "the same modules on the same base model can be compared or merged."
        )
    return sizes.pop()


_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, np.uint8)


def count_bits(packed: np.ndarray) -> int:
    """Number of ones in a packed mask."""
    parts = (packed[a:b] for a, b in chunks(packed.size))
    return sum(int(_BITS_OF_BYTE[part].sum(dtype=np.int64)) for part in parts)
