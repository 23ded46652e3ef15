"""Hybrid probabilities, and which criterion serves which partition."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.criteria import CRITERIA
from prunepeft.criteria.combine import (
    FALLBACK_STRATEGY,
    assign_criteria,
    fallback_strategy,
    hybrid_probability,
    tendency,
)
from prunepeft.errors import ConfigError, UnknownNameError

SALIENCIES = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


def one_partition(values: list[float], **options: bool) -> dict[str, float]:
    units = [f"u{i}" for i in range(len(values))]
    saliency = {"snip": dict(zip(units, values, strict=True))}
    return hybrid_probability(saliency, dict.fromkeys(units, "p"), {"p": ["snip"]}, **options)


@given(SALIENCIES, st.booleans())
def test_least_salient_is_most_likely_removed(values: list[float], paper_exact: bool) -> None:
    found = list(one_partition(values, paper_exact=paper_exact).values())
    for (s, p), (t, q) in itertools.permutations(zip(values, found, strict=True), 2):
        assert s >= t or p >= q


@given(SALIENCIES)
def test_equal_saliency_gives_equal_probability(values: list[float]) -> None:
    found = list(one_partition([*values, values[0]]).values())
    assert found[0] == found[-1]


@given(SALIENCIES, st.booleans())
def test_probabilities_sum_to_one(values: list[float], paper_exact: bool) -> None:
    found = one_partition(values, paper_exact=paper_exact)
    assert sum(found.values()) == pytest.approx(1.0)


@given(st.permutations(range(6)))
def test_does_not_depend_on_the_order_of_units(order: list[int]) -> None:
    values = [0.3, 0.1, 0.1, 2.0, 0.7, 0.0]
    plain = one_partition(values)
    units = [f"u{i}" for i in order]
    saliency = {"snip": {u: values[int(u[1:])] for u in units}}
    assert hybrid_probability(saliency, dict.fromkeys(units, "p"), {"p": ["snip"]}) == plain


def test_constant_saliency_removes_nobody_first() -> None:
    assert len(set(one_partition([3.0] * 7).values())) == 1
    assert one_partition([3.0]) == {"u0": 1.0}


def test_constant_partitions_of_any_size_tie() -> None:
    partitions = {f"{n}.{i}": f"p{n}" for n in range(1, 60) for i in range(n)}
    saliency = {"snip": dict.fromkeys(partitions, 0.2)}
    strategy = {p: ["snip"] for p in partitions.values()}
    assert len(set(hybrid_probability(saliency, partitions, strategy).values())) == 1


def test_ties_keep_module_order_only_in_the_published_form() -> None:
    tied, exact = one_partition([0.0, 0.0, 1.0]), one_partition([0.0, 0.0, 1.0], paper_exact=True)
    assert tied["u0"] == tied["u1"]
    assert exact["u0"] > exact["u1"] > exact["u2"]


def test_partition_size_does_not_decide() -> None:
    partitions = {"a0": "small", "a1": "small"} | {f"b{i}": "large" for i in range(40)}
    saliency = {"snip": {"a0": 0.0, "a1": 40.0} | {f"b{i}": float(i) for i in range(40)}}
    strategy = {"small": ["snip"], "large": ["snip"]}
    ours = hybrid_probability(saliency, partitions, strategy)
    paper = hybrid_probability(saliency, partitions, strategy, paper_exact=True)
    assert min(paper["a0"], paper["a1"]) > paper["b1"]
    assert ours["a0"] == ours["b0"] > ours["b1"] > ours["a1"]


def test_a_useless_partition_goes_before_a_useful_one() -> None:
    partitions = {"a": "useful", "b": "useful", "c": "useless", "d": "useless", "e": "lone"}
    saliency = {"snip": {"a": 1.0, "b": 0.9, "c": 0.0, "d": 0.01, "e": 0.005}}
    strategy = {p: ["snip"] for p in partitions.values()}
    found = hybrid_probability(saliency, partitions, strategy)
    assert sorted(found, key=lambda u: -found[u]) == ["c", "e", "d", "b", "a"]


def test_number_of_criteria_does_not_decide() -> None:
    saliency = {c: {"a": 0.5, "b": 0.5, "c": 0.0, "d": 1.0} for c in ("snip", "gradient")}
    partitions = {"a": "x", "b": "y", "c": "x", "d": "x"}
    found = hybrid_probability(saliency, partitions, {"x": ["snip"], "y": ["snip", "gradient"]})
    assert found["a"] == found["b"]


def test_kinds_are_compared_on_their_own_scales() -> None:
    units = {"a:lora": 1.0, "b:lora": 2.0, "c:serial": 1000.0, "d:serial": 2000.0}
    partitions = dict.fromkeys(units, "p")
    scales = {u: u.rpartition(":")[2] for u in units}
    plain = hybrid_probability({"snip": units}, partitions, {"p": ["snip"]})
    scaled = hybrid_probability({"snip": units}, partitions, {"p": ["snip"]}, scales=scales)
    assert min(plain["a:lora"], plain["b:lora"]) > max(plain["c:serial"], plain["d:serial"])
    assert scaled["a:lora"] == scaled["c:serial"] > scaled["b:lora"] == scaled["d:serial"]


def test_partitions_use_their_own_criteria() -> None:
    saliency = {"snip": {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}}
    saliency["zeros"] = {unit: 1 - s for unit, s in saliency["snip"].items()}
    partitions = {"a": "x", "b": "x", "c": "y", "d": "y"}
    found = hybrid_probability(saliency, partitions, {"x": ["snip"], "y": ["zeros"], "gone": []})
    assert found["a"] == found["d"] > found["b"] == found["c"]
    assert list(found) == ["a", "b", "c", "d"]


def test_thousands_of_units_stay_finite() -> None:
    found = one_partition([float(i) for i in range(1500)])
    assert found["u0"] == max(found.values())
    assert sum(found.values()) == pytest.approx(1.0)


def test_partition_without_criterion_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"partition 'p' has criteria \(\).*covers q"):
        hybrid_probability({"snip": {"a": 1.0}}, {"a": "p"}, {"q": ["snip"]})
    with pytest.raises(ConfigError, match="give it a list of at least one"):
        hybrid_probability({"snip": {"a": 1.0}}, {"a": "p"}, {"p": "snip"})


def test_unscored_criterion_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'snip'"):
        hybrid_probability({"snip": {"a": 1.0}}, {"a": "p"}, {"p": ["snap"]})


@pytest.mark.parametrize("scores", [{}, {"a": float("nan")}, {"a": float("inf")}])
def test_missing_or_infinite_saliency_is_refused(scores: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="'snip' has no finite saliency for a"):
        hybrid_probability({"snip": scores}, {"a": "p"}, {"p": ["snip"]})


def test_tendency_counts_with_zeros() -> None:
    partitions = {"a": "x", "b": "x", "c": "y"}
    found = tendency({"snip": ["a", "b"], "zeros": ["c", "a"], "activation": []}, partitions)
    assert found == {
        "snip": {"x": 2, "y": 0},
        "zeros": {"x": 1, "y": 1},
        "activation": {"x": 0, "y": 0},
    }


def test_tendency_refuses_unknown_units() -> None:
    with pytest.raises(ConfigError, match="removed zz, which is in no partition"):
        tendency({"snip": ["zz"]}, {"a": "x"})


def test_largest_count_takes_the_partition() -> None:
    counts = {"snip": {"x": 3, "y": 0}, "zeros": {"x": 1, "y": 4}}
    assert assign_criteria(counts) == {"x": ["snip"], "y": ["zeros"]}


def test_ties_share_the_partition() -> None:
    counts = {"snip": {"x": 3, "y": 0}, "zeros": {"x": 3, "y": 4}}
    assert assign_criteria(counts) == {"x": ["snip", "zeros"], "y": ["zeros"]}


def test_loser_still_serves_where_it_removed_most() -> None:
    counts = {"snip": {"x": 5, "y": 5, "z": 5}, "zeros": {"x": 2, "y": 2, "z": 1}}
    assert assign_criteria(counts) == {
        "x": ["snip", "zeros"],
        "y": ["snip", "zeros"],
        "z": ["snip"],
    }


def test_idle_criterion_is_skipped_and_idle_partition_gets_all() -> None:
    counts = {"snip": {"x": 2, "y": 0}, "zeros": {"x": 0, "y": 0}}
    assert assign_criteria(counts) == {"x": ["snip"], "y": ["snip", "zeros"]}


def test_absent_partition_counts_zero() -> None:
    assert assign_criteria({"snip": {"x": 1}, "zeros": {"y": 1}}) == {"x": ["snip"], "y": ["zeros"]}
    assert assign_criteria({"snip": {"x": 1}, "zeros": {}}) == {"x": ["snip"]}


def test_no_criteria_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one criterion"):
        assign_criteria({})


@given(
    st.dictionaries(
        st.sampled_from(["snip", "zeros", "threshold"]),
        st.fixed_dictionaries({p: st.integers(0, 5) for p in "wxyz"}),
        min_size=1,
    )
)
@settings(max_examples=200)
def test_assignment_covers_partitions_and_busy_criteria(counts: dict[str, dict[str, int]]) -> None:
    found = assign_criteria(counts)
    assert set(found) == set("wxyz")
    assert all(names and len(set(names)) == len(names) for names in found.values())
    busy = {name for name, count in counts.items() if any(count.values())}
    assert busy <= {name for names in found.values() for name in names}


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ("encoder.0.lora", ["activation", "threshold"]),
        ("decoder.1.dora", ["threshold"]),
        ("encoder.2.parallel_adapter", ["zeros"]),
        ("encoder.0.serial_adapter", ["activation", "minimum_weight", "snip", "zeros"]),
        ("encoder.3.ia3", ["snip"]),
    ],
)
def test_fallback_strategy(partition: str, expected: list[str]) -> None:
    assert fallback_strategy({"a": partition, "b": partition}) == {partition: expected}


def test_fallback_uses_registered_criteria_in_four_blocks() -> None:
    for row in FALLBACK_STRATEGY.values():
        assert len(row) == 4
        assert all(name in CRITERIA for names in row for name in names)


@pytest.mark.parametrize("partition", ["all", "encoder.4.lora", "encoder.1", "encoder.x.lora"])
def test_fallback_refuses_other_partitions(partition: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form stack\.depth\.kind"):
        fallback_strategy({"a": partition})


def test_fallback_refuses_unknown_kinds() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        fallback_strategy({"a": "encoder.1.lorra"})
