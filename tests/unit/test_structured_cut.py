"""Choosing units: exact numbers, ties, floors; the cut as data; ratios that cannot be had."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.errors import ConfigError
from prunepeft.structured import (
    Cut,
    Group,
    check_ratio,
    choose_units,
    n_removed,
    removed_params,
)

NEURONS = Group("encoder.0.ffn", "neurons", "encoder", 0, "ffn", 6, 1, 33, ())
HEADS = Group("encoder.0.attention", "heads", "encoder", 0, "attention", 4, 1, 100, ())
GROUPED = replace(HEADS, n_units=4, heads_per_unit=3)


def layers(group, n):
    return [replace(group, id=group.id.replace("0", str(i)), layer=i) for i in range(n)]


def choose(groups, rows, ratio, scope="layer"):
    scores = {g.id: torch.tensor(row) for g, row in zip(groups, rows, strict=True)}
    cut = choose_units(groups, scores, {groups[0].what: ratio}, {groups[0].what: scope})
    return list(cut.keep.values())


def test_the_lowest_scores_go():
    assert choose([NEURONS], [[0.3, -2.0, 5.0, 0.1, 0.2, 1.0]], 0.5) == [(0, 2, 5)]


def test_equal_scores_lose_exactly_as_many_and_the_first_go():
    groups = layers(replace(HEADS, n_units=16), 24)
    kept = choose(groups, [[1.0] * 16] * 24, 1 / 3)
    assert kept == [tuple(range(5, 16))] * 24
    assert choose(layers(NEURONS, 2), [[0.0] * 6] * 2, 0.25, "global") == [
        (3, 4, 5),
        (0, 1, 2, 3, 4, 5),
    ]


def test_global_scope_may_empty_a_layer_of_neurons_but_not_of_heads():
    rows = [[0.1, 0.2, 0.1, 0.2], [9.0, 8.0, 7.0, 6.0]]
    neurons = layers(replace(NEURONS, n_units=4), 2)
    assert choose(neurons, rows, 0.5, "global") == [(), (0, 1, 2, 3)]
    assert choose(layers(HEADS, 2), rows, 0.5, "global") == [(3,), (0, 1, 2)]


def test_one_unit_stays_in_every_layer():
    rows = [[1.0, 2.0, 3.0, 0.5]]
    assert choose([HEADS], rows, 0.99) == [(2,)]
    assert choose([replace(NEURONS, n_units=4)], rows, 0.99) == [(2,)]
    assert choose(layers(HEADS, 2), rows * 2, 0.99, "global") == [(2,), (2,)]
    assert sum(map(len, choose(layers(NEURONS, 2), [[1.0] * 6] * 2, 0.99, "global"))) == 1


def test_groups_and_kinds_that_are_left_out_keep_all():
    groups = [HEADS, NEURONS, *layers(NEURONS, 3)[1:]]
    scores = {g.id: torch.rand(g.n_units) for g in groups}
    cut = choose_units(groups, scores, {"neurons": 0.5, "heads": 0})
    assert list(cut.keep) == [g.id for g in groups[1:]]
    assert removed_params(groups, cut) == 3 * 3 * 33
    assert choose_units(groups, {}, {}) == Cut()


def test_choosing_checks_what_it_gets():
    with pytest.raises(ConfigError, match=r"encoder.0.ffn needs .* 6 units; got nothing"):
        choose_units([NEURONS], {}, {"neurons": 0.5})
    for bad in (torch.ones(5), torch.tensor([1.0, 2, 3, 4, 5, torch.nan])):
        with pytest.raises(ConfigError, match="6 units; got shape"):
            choose_units([NEURONS], {NEURONS.id: bad}, {"neurons": 0.5})
    with pytest.raises(ConfigError, match="given for"):
        choose_units([NEURONS], {}, {"layers": 0.5})
    with pytest.raises(ConfigError, match="scope of neurons"):
        choose_units([NEURONS], {NEURONS.id: torch.ones(6)}, {"neurons": 0.5}, {"neurons": "all"})


@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4),
    ratio=st.floats(0.01, 0.99),
    scope=st.sampled_from(["layer", "global"]),
    what=st.sampled_from([HEADS, NEURONS]),
)
@settings(max_examples=80, deadline=None)
def test_what_goes_is_never_better_than_what_stays(rows, ratio, scope, what):
    groups = layers(replace(what, n_units=5), len(rows))
    kept = choose(groups, [[float(v) for v in row] for row in rows], ratio, scope)
    floor = 0 if scope == "global" and what is NEURONS else 1
    assert all(len(units) >= floor for units in kept)
    assert all(list(units) == sorted(set(units)) for units in kept)
    n = 5 if scope == "layer" else 5 * len(rows)
    most = n - max(floor * (1 if scope == "layer" else len(rows)), 1)
    gone = 5 * len(rows) - sum(map(len, kept))
    each = min(n_removed(ratio, n), most)
    assert gone == (each * len(rows) if scope == "layer" else each)
    pairs = [(row, set(units)) for row, units in zip(rows, kept, strict=True)]
    if scope == "layer":
        checks = pairs
    else:  # the one that a layer must keep is out of the ranking
        flat = [
            (v, i in units, len(units) > floor) for row, units in pairs for i, v in enumerate(row)
        ]
        lost = [v for v, stays, _ in flat if not stays]
        free = [v for v, stays, movable in flat if stays and movable]
        assert not lost or not free or max(lost) <= max(free)
        checks = []
    for row, units in checks:
        stays = [row[i] for i in units]
        goes = [row[i] for i in range(5) if i not in units]
        assert not goes or max(goes) <= min(stays)


@given(st.lists(st.integers(0, 8), min_size=6, max_size=6), st.floats(0.05, 0.45))
@settings(max_examples=50, deadline=None)
def test_a_higher_ratio_cuts_a_superset(row, ratio):
    scores = [[float(v) for v in row]]
    few, many = choose([NEURONS], scores, ratio), choose([NEURONS], scores, 2 * ratio)
    assert set(many[0]) <= set(few[0])


def test_ratios_that_can_be_had():
    for groups, what, ratio in (
        ([HEADS], "heads", 0.25),
        ([HEADS], "heads", 0.7),
        ([HEADS], "neurons", 0),
        ([GROUPED], "heads", 0.5),
        ([NEURONS], "neurons", 0.1),
    ):
        check_ratio(groups, what, ratio)


@pytest.mark.parametrize(
    ("groups", "what", "ratio", "message"),
    [
        ([HEADS], "heads", 1.0, r"in \[0, 1\); got 1.0"),
        ([HEADS], "heads", -0.1, r"in \[0, 1\); got -0.1"),
        ([HEADS], "heads", True, r"in \[0, 1\); got True"),
        ([HEADS], "heads", float("nan"), r"in \[0, 1\)"),
        ([HEADS], "layers", 0.5, "got 'layers'"),
        ([NEURONS], "heads", 0.5, r"no heads that can go \(it has neurons\)"),
        ([HEADS], "heads", 0.1, r"takes none of the 4 heads .* 0.25 \(1 of 4\)"),
        ([HEADS], "heads", 0.9, r"takes all 4 heads .* 0.75 \(3 of 4\)"),
        ([GROUPED], "heads", 0.4, r"5 of 12 heads, but 3 heads .* 0.5 \(6 of 12\)"),
        ([GROUPED], "heads", 1 / 12, r"1 of 12 heads, .* 0.25 \(3 of 12\)"),
        ([replace(HEADS, n_units=1)], "heads", 0.5, "one must stay"),
    ],
)
def test_ratios_that_cannot_be_had(groups, what, ratio, message):
    with pytest.raises(ConfigError, match=message):
        check_ratio(groups, what, ratio)


def test_a_cut_survives_json_and_has_a_digest():
    cut = Cut({"a.0.ffn": [0, 2], "a.1.ffn": ()}, {"a.0.ffn": 3, "a.1.ffn": 2})
    again = Cut.from_dict(json.loads(json.dumps(cut.to_dict())))
    assert again == cut
    assert hash(again) == hash(cut)
    assert again.digest == cut.digest != Cut().digest
    assert len(cut.digest) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "must be a mapping with"),
        ({"format_version": 2}, "format 2 is not supported"),
        ({"keep": []}, "must be mappings"),
        ({"keep": {"a": 3}}, "lists of units"),
        ({"keep": {"b": [0]}}, "stand only once"),
        ({"keep": {"a": [1, 0]}}, "ascending"),
        ({"keep": {"a": [0, 0]}}, "ascending"),
        ({"keep": {"a": [0, 4]}}, r"in 0\.\.3"),
        ({"keep": {"a": [-1, 2]}}, r"in 0\.\.3"),
        ({"keep": {"a": [0.5]}}, "whole numbers"),
        ({"keep": {"a": [True]}}, "whole numbers"),
        ({"n_units": {"a": 0}}, "must have 1"),
        ({"n_units": {"a": "4"}}, "must have 1"),
    ],
)
def test_a_damaged_cut_is_refused(change, message):
    data = {"format_version": 1, "keep": {"a": [0, 3]}, "n_units": {"a": 4}} | change
    with pytest.raises(ConfigError, match=message):
        Cut.from_dict(data)
    with pytest.raises(ConfigError, match="must be a mapping"):
        Cut.from_dict([])
