"""Two objectives at once: what is not beaten, and how much area it rules over."""

from collections.abc import Sequence

Point = tuple[float, float]  # both are better when larger


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats, the best in the second objective first.

    A point beats another if it is at least as good in both objectives and better in one; of equal
    points the first counts.

    Example:
        >>> front([(-1, 0.80), (-5, 0.85), (-3, 0.79), (-5, 0.85)])
        [1, 0]
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], -points[i][0], i))
    found: list[int] = []
    for i in order:
        if not found or points[i][0] > points[found[-1]][0]:
            found.append(i)
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate, down to a reference point; points not above it add nothing.

    Example:
        >>> round(hypervolume([(-1, 0.80), (-5, 0.85)], (-26, 0.70)), 6)
        3.55
        >>> round(hypervolume([(-1, 0.80), (-5, 0.85), (-3, 0.83)], (-26, 0.70)), 6)
        3.61
    """
    above = [p for p in points if p[0] > reference[0] and p[1] > reference[1]]
    area, reached = 0.0, reference[0]
    for i in front(above):
        x, y = above[i]
        area += (x - reached) * (y - reference[1])
        reached = x
    return area


def reference_point(points: Sequence[Point], margin: float = 0.1) -> Point:
    """A reference for `hypervolume`: the worst of each objective on the front, less a margin.

    Args:
        points: At least one.
        margin: Share of the front's range; where that is zero, of the value itself, or of 1.
    """
    best = [points[i] for i in front(points)]
    found = []
    for values in zip(*best, strict=True):
        worst, span = min(values), max(values) - min(values)
        found.append(worst - margin * (span or abs(worst) or 1.0))
    return found[0], found[1]
