"""Signs in {-1, 0, 1} as bytes and back, exactly: bit masks or Golomb-Rice code."""

import math
from dataclasses import dataclass

import numpy as np

from prunepeft.compression.vectors import CHUNK, chunks
from prunepeft.errors import CheckpointError, ConfigError

CODECS = ("golomb", "bitmask")
_LOG_GOLDEN = math.log((math.sqrt(5) - 1) / 2)  # log(phi - 1)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded signs.

    Attributes:
        codec: `golomb` or `bitmask`.
        size: Number of entries d.
        n_kept: How many are not zero.
        low_bits: Low bits of a gap that are stored as they are, b* (golomb).
        payload: The bytes, uint8. Bit masks: positive, then negative. Golomb-Rice: the unary parts
            of all gaps, padded with ones to whole bytes, then their low bits and then the signs,
            both padded with zeros. These are the bits of the usual interleaved code in an order
            that arrays can be made of.
    """

    codec: str
    size: int
    n_kept: int
    low_bits: int
    payload: np.ndarray


def encode(signs: np.ndarray, codec: str = "golomb") -> Encoded:
    """Encode signs, (d,) int8 in {-1, 0, 1}.

    Golomb-Rice: of each kept entry the gap g (zeros since the last kept one) as g >> b* in unary
    (ones, then a zero), the low b* bits of g, and one bit that is 1 for a negative sign.
    """
    if codec not in CODECS:
        raise ConfigError(f"codec must be one of {', '.join(CODECS)}; got {codec!r}.")
    n_kept = int(np.count_nonzero(signs))
    if codec == "bitmask":
        masks = (np.packbits(signs > 0), np.packbits(signs < 0))
        return Encoded(codec, signs.size, n_kept, 0, np.concatenate(masks))
    low_bits = rice_bits(n_kept, signs.size)
    ends: list[np.ndarray] = []
    low: list[np.ndarray] = []
    negative: list[np.ndarray] = []
    before = -1
    for begin, end in chunks(signs.size):
        part = signs[begin:end]
        places = np.flatnonzero(part != 0)
        if not places.size:
            continue
        gaps = np.diff(places, prepend=before - begin) - 1
        before = int(places[-1]) + begin
        ends.append(_unary_ends(gaps >> low_bits))
        low.append(_low(gaps, low_bits))
        negative.append(part[places] < 0)
    payload = np.concatenate([~_packed(ends), _packed(low), _packed(negative)])
    return Encoded(codec, signs.size, n_kept, low_bits, payload)


def decode(encoded: Encoded) -> np.ndarray:
    """The signs, (d,) int8.

    Raises:
        CheckpointError: if the bytes are not what `encode` makes of such signs.
    """
    if encoded.codec not in CODECS:
        raise _damaged(f"the codec {encoded.codec!r:.40} is unknown")
    if not 0 <= encoded.n_kept <= encoded.size or not 0 <= encoded.low_bits < 48:
        raise _damaged("its counts are impossible")
    return _decode_masks(encoded) if encoded.codec == "bitmask" else _decode_golomb(encoded)


def rice_bits(n_kept: int, size: int) -> int:
    """Best number of low bits b* for `n_kept` random places among `size`.

    1 + floor(log2(log(phi - 1) / log(1 - k))) with the golden ratio phi and k = n_kept / size, at
    least 0.
    """
    if n_kept == 0 or n_kept >= size:
        return 0
    ratio = _LOG_GOLDEN / math.log1p(-n_kept / size)
    return max(0, 1 + math.floor(math.log2(ratio)))


def entropy_bits(size: int, density: float) -> float:
    """Fewest bits for random ternary signs of this density, and 16 for the scale."""
    rest = 1 - density
    zeros = -rest * math.log2(rest) if rest > 0 else 0.0
    return size * (zeros - density * math.log2(density / 2)) + 16


def golomb_bits(size: int, density: float) -> float:
    """Expected bits of the Golomb-Rice code at random places, and 16 for the scale."""
    b = rice_bits_at(density)
    per_place = b + 1 / (1 - (1 - density) ** (2**b))
    return density * size * (per_place + 1) + 16


def rice_bits_at(density: float) -> int:
    """`rice_bits` for a share."""
    return rice_bits(round(density * 2**40), 2**40)


def _unary_ends(quotients: np.ndarray) -> np.ndarray:
    """Each number as so many ones and a zero, all inverted, one byte per bit."""
    ends = np.cumsum(quotients + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1, np.bool_)
    bits[ends] = True
    return bits


def _low(gaps: np.ndarray, n_bits: int) -> np.ndarray:
    """The low bits of each number, highest first, one byte per bit."""
    bits = np.empty((gaps.size, n_bits), np.uint8)
    for place in range(n_bits):
        bits[:, place] = (gaps >> (n_bits - 1 - place)) & 1
    return bits.reshape(-1)


def _packed(pieces: list[np.ndarray]) -> np.ndarray:
    return np.packbits(np.concatenate(pieces)) if pieces else np.zeros(0, np.uint8)


def _decode_masks(encoded: Encoded) -> np.ndarray:
    width = -(-encoded.size // 8)
    if encoded.payload.size != 2 * width:
        raise _damaged(f"{encoded.payload.size} bytes cannot be two masks of {encoded.size} bits")
    bits = [np.unpackbits(m).view(np.int8) for m in np.split(encoded.payload, 2)]
    clashes = np.any(encoded.payload[:width] & encoded.payload[width:])
    signs = bits[0][: encoded.size] - bits[1][: encoded.size]
    if clashes or any(b[encoded.size :].any() for b in bits):
        raise _damaged("its masks overlap or are longer than the vector")
    if np.count_nonzero(signs) != encoded.n_kept:
        raise _damaged("its masks do not hold the number of entries it claims")
    return signs


def _decode_golomb(encoded: Encoded) -> np.ndarray:
    n, b = encoded.n_kept, encoded.low_bits
    signs = np.zeros(encoded.size, np.int8)
    low_bytes, sign_bytes = -(-n * b // 8), -(-n // 8)
    unary_bytes = encoded.payload.size - low_bytes - sign_bytes
    if unary_bytes < sign_bytes or (n == 0 and unary_bytes):
        raise _damaged(f"{encoded.payload.size} bytes cannot hold {n} entries")
    unary = encoded.payload[:unary_bytes]
    low = _unpacked(encoded.payload[unary_bytes : unary_bytes + low_bytes], n * b)
    negative = _unpacked(encoded.payload[unary_bytes + low_bytes :], n)
    seen, last_end, last_place = 0, -1, -1
    for begin, end in chunks(unary_bytes, CHUNK // 8):
        ends = np.flatnonzero(np.unpackbits(~unary[begin:end]).view(np.bool_)) + 8 * begin
        upto = seen + ends.size
        if upto > n:
            raise _damaged(f"it holds more than {n} entries")
        if not ends.size:
            continue
        quotients = np.diff(ends, prepend=last_end) - 1
        if int(quotients.max()) > encoded.size >> b:
            raise _damaged("a gap is longer than the vector")
        gaps = (quotients << b) + _read_low(low[seen * b : upto * b], b, ends.size)
        places = np.cumsum(gaps + 1) + last_place
        if int(places[-1]) >= encoded.size:
            raise _damaged("its entries lie behind the end of the vector")
        signs[places] = 1 - 2 * negative[seen:upto].view(np.int8)
        seen, last_end, last_place = upto, int(ends[-1]), int(places[-1])
    if seen != n or (n and -(-(last_end + 1) // 8) != unary_bytes):
        raise _damaged(f"it holds {seen} entries where {n} are due, or has bytes left over")
    return signs


def _read_low(bits: np.ndarray, n_bits: int, n: int) -> np.ndarray:
    """The inverse of `_low`."""
    table = bits.reshape(n, n_bits)
    values = np.zeros(n, np.int64)
    for place in range(n_bits):
        values = (values << 1) | table[:, place]
    return values


def _unpacked(packed: np.ndarray, n_bits: int) -> np.ndarray:
    bits = np.unpackbits(packed)
    if bits[n_bits:].any():
        raise _damaged("bits are set behind the last entry")
    return bits[:n_bits]


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the compressed signs are damaged: {reason}. Restore the file from a copy, or compress "
        "the adapter again."
    )
