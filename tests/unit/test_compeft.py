"""ComPEFT: worked numbers, invariants of the compression and of the arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.compression import arithmetic
from prunepeft.compression.compeft import (
    ALPHAS,
    DENSITIES,
    compress,
    grid_search,
    mean_magnitude,
    prune_only,
    sparsify,
    spread,
)
from prunepeft.compression.vectors import DenseVector, Joined, TernaryVector, to_dense
from prunepeft.errors import CheckpointError, ConfigError

TAU = np.array([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0], np.float32)
# Many ties, zeros and both signs.
COARSE = st.lists(st.integers(-3, 3), min_size=1, max_size=60)
SHARES = st.floats(0.01, 1.0)


def random_vector(seed, size=5000, density=0.2, scale=0.7):
    values = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return TernaryVector.from_signs(sparsify(values, density), scale)


# ---- compression -------------------------------------------------------------------------------


def test_worked_example():
    made = compress(TAU, 0.3)
    assert spread(TAU) == pytest.approx(0.65192, abs=5e-6)
    assert made.signs().tolist() == [0, 0, 0, 0, 0, 0, 0, -1, 1, -1]
    assert to_dense(made) == pytest.approx(0.65192 * made.signs(), abs=5e-6)


def test_stc_averages_magnitudes():
    made = compress(TAU, 0.3, method="stc")
    assert made.scale == pytest.approx(0.9)
    assert TAU[made.signs() != 0].mean() == pytest.approx(-0.3)  # what the released code takes


def test_magnitude_over_sigma_is_the_closest_alpha():
    signs = sparsify(TAU, 0.5)
    best = mean_magnitude(TAU, signs) / spread(TAU)
    errors = {
        a: np.square(TAU - to_dense(compress(TAU, 0.5, a))).sum()
        for a in (0.9 * best, best, 1.1 * best)
    }
    assert min(errors, key=errors.get) == best


@given(COARSE, SHARES)
def test_exact_count_and_largest_first(values, density):
    tau = np.array(values, np.float32)
    signs = sparsify(tau, density)
    kept, n = signs != 0, round(density * tau.size)
    assert kept.sum() == min(n, np.count_nonzero(tau))
    assert np.array_equal(signs[kept], np.sign(tau[kept]))
    if 0 < kept.sum() < tau.size:
        assert np.abs(tau[kept]).min() >= np.abs(tau[~kept]).max()


def test_first_of_equal_magnitudes_stays():
    assert sparsify(np.array([1, -1, 1, -1, 2], np.float32), 0.6).tolist() == [1, -1, 0, 0, 1]
    assert np.count_nonzero(sparsify(np.ones(3_000_000, np.float32), 0.5)) == 1_500_000


def test_threshold_of_a_large_vector_is_that_of_sorting():
    tau = np.random.default_rng(0).normal(size=2_500_000).astype(np.float32)
    kept = sparsify(tau, 0.1) != 0
    wanted = np.argsort(-np.abs(tau), kind="stable")[:250_000]
    assert np.array_equal(np.flatnonzero(kept), np.sort(wanted))


@given(COARSE, SHARES, st.sampled_from([0.125, 0.5, 2.0, 64.0]))
def test_scaling_and_negation(values, density, factor):
    tau = np.array(values, np.float32)
    made, scaled, negated = (compress(t, density) for t in (tau, factor * tau, -tau))
    assert np.array_equal(made.signs(), scaled.signs())
    assert scaled.scale == pytest.approx(factor * made.scale)
    assert np.array_equal(to_dense(negated), -to_dense(made))


def test_compressing_again_keeps_the_signs():
    made = compress(np.random.default_rng(1).normal(size=1000).astype(np.float32), 0.2)
    assert np.array_equal(compress(to_dense(made), 0.2).signs(), made.signs())


def test_alpha_zero_density_one_and_nothing():
    assert not to_dense(compress(TAU, 0.3, 0.0)).any()
    assert np.array_equal(compress(TAU, 1.0).signs(), np.sign(TAU))
    assert compress(np.zeros(5, np.float32), 0.5).n_kept == 0
    assert compress(np.array([-2.0], np.float32), 1.0).block(0, 1).tolist() == [-2.0]
    assert compress(np.zeros(0, np.float32), 0.5).size == 0


def test_prune_only_keeps_values():
    assert prune_only(TAU, 0.2).tolist() == [0] * 8 + [pytest.approx(0.9), -1.0]


@pytest.mark.parametrize("density", [0, -0.1, 1.01, 20, float("nan"), "0.1", True])
def test_density_is_a_fraction(density):
    with pytest.raises(ConfigError, match="share in"):
        sparsify(TAU, density)


@pytest.mark.parametrize("alpha", [-1, float("inf"), float("nan")])
def test_alpha_is_a_number(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        compress(TAU, 0.1, alpha)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_vector_is_refused(value):
    with pytest.raises(CheckpointError, match="NaN"):
        compress(np.array([1, value], np.float32), 0.5)


def test_unknown_method_and_two_axes():
    with pytest.raises(ConfigError, match="compeft, stc"):
        compress(TAU, 0.1, method="best")
    with pytest.raises(ConfigError, match="one axis"):
        compress(TAU.reshape(2, 5), 0.1)


# ---- grid --------------------------------------------------------------------------------------


def test_grid_is_the_paper_s_and_finds_the_peak():
    def evaluate(density, alpha):
        return -((density - 0.2) ** 2) - (alpha - 3) ** 2

    best, tried = grid_search(evaluate, greater_is_better=True)
    assert (best.density, best.alpha) == (0.2, 3.0)
    assert len(tried) == len(DENSITIES) * len(ALPHAS) == 45
    worst, _ = grid_search(evaluate, greater_is_better=False)
    assert worst.value == min(c.value for c in tried)


def test_equal_pairs_give_the_smallest_file():
    best, _ = grid_search(lambda k, a: 1.0, greater_is_better=True, densities=(0.5, 0.1))
    assert (best.density, best.alpha) == (0.1, 0.5)


def test_pairs_that_fail_are_passed_over():
    best, _ = grid_search(lambda k, a: a if a < 5 else float("nan"), greater_is_better=True)
    assert best.alpha == 4.0
    with pytest.raises(ConfigError, match="finite"):
        grid_search(lambda k, a: float("nan"), greater_is_better=True)


# ---- arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 5000])
def test_dot_norm_and_cosine_are_the_dense_ones(size):
    a, b = random_vector(1, size, 0.5), random_vector(2, size, 0.6, scale=-0.3)
    x, y = to_dense(a).astype(float), to_dense(b).astype(float)
    assert arithmetic.dot(a, b) == pytest.approx(x @ y)
    assert arithmetic.norm(a) == pytest.approx(np.linalg.norm(x))
    assert arithmetic.norm(b, 1) == pytest.approx(np.abs(y).sum())
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    assert arithmetic.cosine(a, b) == pytest.approx(x @ y / lengths if lengths else 0.0)
    assert arithmetic.distance(a, b) == np.abs(a.signs() - b.signs()).sum()
    assert arithmetic.cosine(a, TernaryVector.from_signs(np.zeros(size, np.int8), 1.0)) == 0.0


def test_weighted_sum_is_the_dense_one():
    vectors = [random_vector(s, 2_100_000, 0.1, 0.1 * s) for s in (1, 2, 3)]
    dense = sum(w * to_dense(v) for v, w in zip(vectors, (1.0, -0.5, 2.0), strict=True))
    merged = arithmetic.weighted_sum(vectors, (1.0, -0.5, 2.0))
    assert np.abs(merged - dense).max() < 1e-6


def reference_ties(rows):
    """Straight from the definition, entry by entry."""
    elected = np.sign(rows.sum(0))
    majority = np.sign(elected.sum())
    found = []
    for column, sign in zip(rows.T, np.where(elected == 0, majority, elected), strict=True):
        agreeing = [v for v in column if v * sign > 0]
        found.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(found)


@given(st.integers(0, 1000), st.integers(2, 5))
def test_ties_is_its_definition(seed, n):
    vectors = [random_vector(seed + i, 50, 0.5, 0.5) for i in range(n)]
    rows = np.stack([to_dense(v) for v in vectors])
    assert arithmetic.ties_merge(vectors) == pytest.approx(reference_ties(rows))
    mixed = [DenseVector(rows[0]), *vectors[1:]]
    assert arithmetic.ties_merge(mixed) == pytest.approx(reference_ties(rows))


def test_ties_by_hand():
    """Three entries: agreement, a majority, and a draw that goes to the overall majority."""
    a, b = (TernaryVector.from_signs(np.array(s, np.int8), 1.0) for s in ([1, 1, -1], [1, 0, 1]))
    assert arithmetic.ties_merge([a, b]).tolist() == [1, 1, 1]
    assert arithmetic.ties_merge([a, b], [3, 1]).tolist() == [1, 1, -1]
    assert arithmetic.ties_merge([a, a]).tolist() == to_dense(a).tolist()


def test_arithmetic_refuses_what_does_not_fit():
    a, b = random_vector(1, 8), random_vector(1, 9)
    for call in (
        lambda: arithmetic.dot(a, b),
        lambda: arithmetic.weighted_sum([a, b], [1, 1]),
        lambda: arithmetic.weighted_sum([a], [1, 1]),
        lambda: arithmetic.weighted_sum([], []),
        lambda: arithmetic.ties_merge([a, a], [1, -1]),
        lambda: arithmetic.norm(a, 3),
    ):
        with pytest.raises(ConfigError):
            call()


@given(st.integers(0, 60), st.integers(0, 60))
def test_blocks_at_any_bit(begin, end):
    vector = random_vector(5, 60, 0.5)
    begin, end = sorted((begin, end))
    assert vector.block(begin, end).tolist() == to_dense(vector)[begin:end].tolist()
    joined = Joined([(vector, 3, 20), (DenseVector(np.ones(5, np.float32)), 0, 5), (vector, 0, 38)])
    whole = [*to_dense(vector)[3:20], *np.ones(5), *to_dense(vector)[:38]]
    assert joined.block(begin, end).tolist() == whole[begin:end]
