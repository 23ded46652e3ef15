"""Signs to bytes and back: exact always, and as small as the formula says."""

import math

import numpy as np
import pytest

from prunepeft.compression.codecs import (
    CODECS,
    Encoded,
    decode,
    encode,
    entropy_bits,
    golomb_bits,
    rice_bits,
    rice_bits_at,
)
from prunepeft.errors import CheckpointError, ConfigError

# density, entropy and Golomb bits per parameter, b*, ratio to 16 bits
WORKED = (
    (0.01, 0.0908, 0.0911, 6, 176),
    (0.05, 0.3364, 0.3393, 4, 47),
    (0.1, 0.5690, 0.5756, 3, 27.8),
    (0.2, 0.9219, 0.9388, 2, 17.0),
    (0.3, 1.1813, 1.1882, 1, 13.5),
    (0.5, 1.5000, 1.5000, 0, 10.7),
)


def random_signs(generator, size, n_kept):
    signs = np.zeros(size, np.int8)
    places = generator.choice(size, n_kept, replace=False)
    signs[places] = generator.choice([-1, 1], n_kept)
    return signs


def at_places(size, *places):
    signs = np.zeros(size, np.int8)
    signs[list(places)] = -1
    return signs


@pytest.mark.parametrize(("density", "entropy", "golomb", "b", "ratio"), WORKED)
def test_sizes_of_the_paper(density, entropy, golomb, b, ratio):
    size = 10**9
    assert rice_bits_at(density) == b
    assert entropy_bits(size, density) / size == pytest.approx(entropy, abs=6e-5)
    assert golomb_bits(size, density) / size == pytest.approx(golomb, abs=6e-5)
    assert 16 * size / golomb_bits(size, density) == pytest.approx(ratio, rel=6e-3)


def test_the_worked_model_of_65_billion():
    params = 799_539_200
    assert params * 2 / 2**30 == pytest.approx(1.49, abs=5e-3)
    sizes = [golomb_bits(params, k) / 8 / 2**20 for k in (0.10, 0.11)]
    assert sizes[0] < params * 2 / 26 / 2**20 < sizes[1]


@pytest.mark.parametrize(("codec", "trips"), [("golomb", 10_000), ("bitmask", 1_000)])
def test_random_round_trips(codec, trips):
    generator = np.random.default_rng(0)
    for _ in range(trips):
        size = int(generator.integers(0, 200))
        signs = random_signs(generator, size, int(generator.integers(0, size + 1)))
        assert np.array_equal(decode(encode(signs, codec)), signs)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 7, 8, 100_000])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.5, 1.0])
def test_round_trip_at_every_size_and_density(codec, size, density):
    signs = random_signs(np.random.default_rng(1), size, round(density * size))
    encoded = encode(signs, codec)
    assert encoded.n_kept == round(density * size)
    assert np.array_equal(decode(encoded), signs)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "signs",
    [
        np.zeros(0, np.int8),
        at_places(3_000_000, 0),
        at_places(3_000_000, 2_999_999),  # the longest gap
        at_places(3_000_000, 0, 2_999_999),
        at_places(2**21, 2**20 - 1, 2**20),  # both sides of a block's edge
    ],
    ids="nothing first last both edge".split(),
)
def test_round_trip_across_blocks(codec, signs):
    assert np.array_equal(decode(encode(signs, codec)), signs)


@pytest.mark.parametrize("density", [row[0] for row in WORKED])
def test_measured_size_is_that_of_the_formula(density):
    size = 1_000_000
    signs = random_signs(np.random.default_rng(2), size, round(density * size))
    bits = 8 * encode(signs).payload.size
    assert bits == pytest.approx(golomb_bits(size, density) - 16, rel=0.02)
    assert bits >= 0.998 * (entropy_bits(size, density) - 16)
    assert 8 * encode(signs, "bitmask").payload.size == 2 * size


def test_random_vector_of_the_paper_takes_a_third_of_a_bit():
    signs = random_signs(np.random.default_rng(3), 200_000, 10_000)
    assert 8 * encode(signs).payload.size / 200_000 == pytest.approx(0.34, abs=0.005)


def test_low_bits_at_the_ends():
    assert rice_bits(0, 10) == rice_bits(10, 10) == 0
    assert rice_bits(1, 10**9) == 29
    assert math.isfinite(golomb_bits(10, 1.0))
    assert golomb_bits(10, 1.0) == 10 * 2 + 16  # a zero of the unary part and a sign


def test_one_code_by_hand():
    """b* = 1: gaps 0, 2 and 1 are 0, 10 and 0 in unary with low bits 0, 0 and 1."""
    signs = np.array([1, 0, 0, -1, 0, 1, 0, 0, 0, 0], np.int8)
    encoded = encode(signs)
    assert encoded.low_bits == 1
    assert encoded.payload.tolist() == [0b0100_1111, 0b0010_0000, 0b0100_0000]


@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_found_or_harmless(codec):
    """Every change of a byte or a count ends in CheckpointError or in signs of the same size."""
    signs = random_signs(np.random.default_rng(4), 200, 20)
    good = encode(signs, codec)
    bad = [
        Encoded(codec, good.size, n, b, p)
        for n, b, p in (
            (good.n_kept + 1, good.low_bits, good.payload),
            (good.n_kept - 9, good.low_bits, good.payload),
            (-1, good.low_bits, good.payload),
            (good.n_kept, 60, good.payload),
            (good.n_kept, good.low_bits, good.payload[:-1]),
            (good.n_kept, good.low_bits, good.payload[:0]),
            (good.n_kept, good.low_bits, np.append(good.payload, np.uint8(0))),
        )
    ]
    for encoded in bad:
        with pytest.raises(CheckpointError, match="damaged"):
            decode(encoded)
    for place in range(good.payload.size):
        for bit in range(8):
            payload = good.payload.copy()
            payload[place] ^= 1 << bit
            flipped = Encoded(codec, good.size, good.n_kept, good.low_bits, payload)
            try:
                assert decode(flipped).shape == signs.shape
            except CheckpointError:
                continue


def test_unknown_codec():
    with pytest.raises(ConfigError, match="golomb, bitmask"):
        encode(np.zeros(3, np.int8), "huffman")
    with pytest.raises(CheckpointError):
        decode(Encoded("huffman", 0, 0, 0, np.zeros(0, np.uint8)))
