"""Fronts and hypervolume."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.pareto import front, hypervolume, reference_point

POINTS = st.lists(
    st.tuples(st.integers(-20, 20).map(float), st.integers(-20, 20).map(float)),
    min_size=1,
    max_size=12,
)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def test_worked_numbers():
    points = [(-1, 0.80), (-5, 0.85)]
    assert hypervolume(points, (-26, 0.70)) == pytest.approx(3.55)
    assert hypervolume([*points, (-3, 0.83)], (-26, 0.70)) == pytest.approx(3.61)
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(-27, 0.9), (-1, 0.7)], (-26, 0.70)) == 0


@given(POINTS)
def test_front_is_what_nothing_beats(points):
    on = front(points)
    assert {points[i] for i in on} == {p for p in points if not any(beats(q, p) for q in points)}
    assert len({points[i] for i in on}) == len(on)


@given(POINTS, st.tuples(st.integers(-20, 20).map(float), st.integers(-20, 20).map(float)))
def test_hypervolume_counts_unit_squares(points, reference):
    cells = {
        (x, y)
        for a, b in points
        for x in range(int(reference[0]), int(a))
        for y in range(int(reference[1]), int(b))
    }
    assert hypervolume(points, reference) == pytest.approx(len(cells))


@given(POINTS)
def test_front_lies_above_the_reference_point(points):
    reference = reference_point(points)
    assert all(points[i][0] > reference[0] for i in front(points))
    assert all(points[i][1] > reference[1] for i in front(points))
