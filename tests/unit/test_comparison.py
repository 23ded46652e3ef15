"""Paired tests, fronts and hypervolume of a comparison, against numbers worked out by hand."""

import json
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prunepeft.compare.comparison import Cell, make_comparison, mean_line
from prunepeft.compare.paired_tests import Paired, holm, paired, signed_rank, summary, verdict


def cell(method, seed, metric, cost="own", **more):
    more = {"n_params": 100, "used": 100, "train_steps": 10, "epochs": 1} | more
    return Cell(method, cost, seed, metric=metric, metrics={"accuracy": metric}, **more)


def rows_of(comparison, cost="own"):
    return {row["method"]: row for row in comparison["tables"][cost]["rows"]}


# --- paired tests ---------------------------------------------------------------------------------


def test_worked_interval():
    """Standard error 0.01 / sqrt(3), t(0.975, 2) = 4.302653; p = 1 - t / sqrt(2 + t^2)."""
    found = paired([0.01, 0.02, 0.03])
    assert (found.n, found.mean) == (3, pytest.approx(0.02))
    reach = 4.302653 * 0.01 / 3**0.5
    assert (found.low, found.high) == (
        pytest.approx(0.02 - reach, abs=1e-7),
        pytest.approx(0.02 + reach, abs=1e-7),
    )
    assert found.p == pytest.approx(1 - 3.4641016 / 14**0.5, abs=1e-7)
    assert found.p_wilcoxon is None


def test_what_cannot_be_known_is_none():
    assert paired([]) == Paired(0, note="no common seed")
    one = paired([0.3])
    assert (one.n, one.mean, one.low, one.p) == (1, 0.3, None, None)
    zeros = paired([0.0, 0.0, 0.0])
    assert (zeros.mean, zeros.low, zeros.high, zeros.p) == (0, 0, 0, 1)
    # 0.85 - 0.80 and 0.75 - 0.70 differ by rounding alone
    equal = paired([0.85 - 0.80, 0.75 - 0.70])
    assert (equal.low, equal.high, equal.p) == (None, None, None)
    assert "same difference" in equal.note
    assert summary([]) == {"mean": None, "std": None, "n": 0}
    assert summary([0.5, 0.7])["std"] == pytest.approx(0.02**0.5)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 64),
        ([-1, 2, 3, 4, 5, 6], 4 / 64),  # rank sums 0 and 1
        ([1, 1, 1, 1, 1, -1], 14 / 64),  # all ranks 3.5: none or one negative
        ([0, 0, 1, 2, 3, 4], 2 / 16),  # zeros are left out
        ([0, 0, 0, 0, 0, 0], 1.0),
        ([3, -3, 2, -2, 1, -1], 1.0),
        ([1, 2, 3, 4, 5], None),
    ],
)
def test_signed_rank_by_hand(differences, p):
    assert signed_rank(differences) == p


@given(st.lists(st.integers(-30, 30).filter(bool), min_size=6, max_size=9))
def test_signed_rank_counts_all_signs(values):
    ranks = stats.rankdata([abs(v) for v in values])
    total = ranks.sum()
    up = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    sums = [sum(r * s for r, s in zip(ranks, signs, strict=True)) for signs in
            product((0, 1), repeat=len(values))]  # fmt: skip
    expected = min(1, 2 * sum(s <= min(up, total - up) for s in sums) / len(sums))
    assert signed_rank(values) == pytest.approx(expected)


def test_signed_rank_without_ties_is_scipys():
    values = [0.3, -0.1, 0.7, 1.2, -0.4, 0.9, 2.2, 0.05]
    assert signed_rank(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_holm_and_verdict():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "b": 0.06, "c": 0.06}
    assert holm({"a": None, "b": 0.9, "c": 0.8}) == {"a": None, "b": 1.0, "c": 1.0}
    better, worse = Paired(3, 0.1), Paired(3, -0.1)
    assert verdict(better, 0.01, greater_is_better=True) == "ahead"
    assert verdict(better, 0.01, greater_is_better=False) == "behind"
    assert verdict(worse, 0.01, greater_is_better=True) == "behind"
    assert verdict(worse, 0.06, greater_is_better=True) == "no difference shown"
    assert verdict(worse, None, greater_is_better=True) == "no difference shown"


# --- a comparison ---------------------------------------------------------------------------------


def three_methods():
    base = {0: 0.80, 1: 0.82, 2: 0.81}
    cells = [cell("prunepeft", s, v, search_steps=20) for s, v in base.items()]
    gaps = {0: 0.050, 1: 0.051, 2: 0.052}
    cells += [cell("better", s, base[s] + gaps[s], search_steps=50) for s in base]
    cells += [cell("lora", s, base[s] + g) for s, g in zip(base, (-0.01, 0.02, -0.02), strict=True)]
    return cells


def test_rows_fronts_and_words():
    found = make_comparison(three_methods(), "prunepeft")
    rows = rows_of(found)
    assert rows["prunepeft"]["metric"] == {
        "mean": pytest.approx(0.81), "std": pytest.approx(0.01), "n": 3,
    }  # fmt: skip
    assert rows["prunepeft"]["verdict"] == "reference"
    assert rows["better"]["verdict"] == "ahead"
    assert rows["better"]["difference"]["mean"] == pytest.approx(0.051)
    assert rows["better"]["difference"]["p_holm"] == 2 * rows["better"]["difference"]["p"]
    assert rows["lora"]["verdict"] == "no difference shown"
    assert found["tables"]["own"]["fronts"]["steps"] == ["better", "prunepeft", "lora"]
    assert found["tables"]["own"]["fronts"]["parameters"] == ["better"]
    text = " ".join(found["takeaways"])
    assert "better ahead of prunepeft" in text
    assert "no difference to prunepeft shown for lora" in text
    assert "from 10 (lora) to 60 (better)" in text


def test_a_metric_that_is_better_when_low():
    cells = [cell("a", s, v) for s, v in enumerate((1.0, 1.1, 1.2))]
    cells += [cell("b", s, v) for s, v in enumerate((2.0, 2.11, 2.22))]
    found = make_comparison(cells, "a", greater_is_better=False)
    assert rows_of(found)["b"]["verdict"] == "behind"
    assert found["tables"]["own"]["fronts"]["parameters"] == ["a"]


def test_holes_leave_no_nan():
    cells = [cell("a", 0, 0.5), cell("a", 1, 0.6), cell("b", 1, 0.7)]
    cells += [Cell("b", "own", 0, error="out of memory"), Cell("c", "own", 0, error="broken")]
    found = make_comparison(cells, "a")
    json.dumps(found, allow_nan=False)
    rows = rows_of(found)
    assert rows["b"]["difference"]["n"] == 1
    assert (rows["b"]["failed"], rows["c"]["failed"], rows["c"]["metric"]["n"]) == (1, 1, 0)
    assert rows["c"]["parameters"] is None
    assert "b (1), c (1)" in " ".join(found["takeaways"])
    all_failed = make_comparison([Cell("a", "own", 0), Cell("b", "own", 0)], "a")
    assert all_failed["tables"]["own"]["hypervolume"] == {"reference_point": None, "lines": {}}


def test_one_seed_shows_nothing():
    found = make_comparison([cell("a", 0, 0.5), cell("b", 0, 0.9)], "a")
    assert rows_of(found)["b"]["verdict"] == "no difference shown"
    assert "One seed shows no difference" in found["takeaways"][0]


def test_a_diverged_perplexity_leaves_numbers_that_json_knows():
    cells = [cell("a", s, 75.0 + s) for s in (0, 1)] + [cell("b", 0, 1e304), cell("b", 1, 77.0)]
    cells = [replace(c, used=1e5 * (1 + c.seed)) for c in cells]
    found = make_comparison(cells, "a", greater_is_better=False)
    json.dumps(found, allow_nan=False)
    assert found["tables"]["own"]["hypervolume"]["lines"] == {}


def test_what_is_said_of_the_seeds_counts_pairs():
    cells = [cell("a", 0, 0.5), cell("a", 1, 0.6), cell("b", 2, 0.7), cell("b", 3, 0.7)]
    assert "No seed in common with a: b." in make_comparison(cells, "a")["takeaways"][0]
    cells.append(cell("b", 1, 0.7))
    assert "One seed shows" in make_comparison(cells, "a")["takeaways"][0]


def test_over_the_allowance_is_said():
    cells = [cell("a", 0, 0.5, "equal", allowance=10)]
    cells += [cell("b", 0, 0.5, "equal", allowance=10, search_steps=7)]
    found = make_comparison(cells, "a")
    assert rows_of(found, "equal")["b"]["ratio"] == pytest.approx(1.7)
    assert "b by 1.7x" in " ".join(found["takeaways"])


def test_hypervolume_by_hand():
    """Points (cost, metric): trials (10, 0.7) and (5, 0.6), result (10, 0.8); other (20, 0.8).

    The worst values are 20 and 0.6, the ranges 15 and 0.2: the reference point is (21.5, 0.58).
    """
    trace = ((4, 10, 0.7), (8, 5, 0.6))
    cells = [cell("search", 0, 0.8, used=10, search_steps=8, train_steps=12, trace=trace)]
    cells += [cell("lora", 0, 0.8, used=20, train_steps=12)]
    found = make_comparison(cells, "search")["tables"]["own"]["hypervolume"]
    assert found["reference_point"] == [21.5, pytest.approx(0.58)]
    first = 11.5 * 0.12
    lines = {m: [(x, pytest.approx(y)) for x, y in line] for m, line in found["lines"].items()}
    assert [(4, first), (8, first + 5 * 0.02), (20, 11.5 * 0.22 + 5 * 0.02)] == lines["search"]
    assert [(12, 1.5 * 0.22)] == lines["lora"]


LINES = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=5).map(
        lambda line: sorted((float(x), float(y)) for x, y in line)
    ),
    min_size=1,
    max_size=4,
)


@given(LINES)
def test_mean_lines_never_fall(lines):
    values = [y for _, y in mean_line(lines)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(sum(max(y for _, y in li) for li in lines) / len(lines))


def test_cells_survive_json():
    one = cell("a", 0, 0.5, trace=((4, 10, 0.7),), note="x", allowance=20)
    assert Cell.from_dict(json.loads(json.dumps(one.to_dict()))) == one
