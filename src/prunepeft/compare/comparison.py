"""What finished runs of several methods say about each other; plain data in and out, no files.

Points on a front are (-cost, metric), the metric turned so that more is better.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunepeft.compare.paired_tests import CONFIDENCE, holm, paired, summary, verdict
from prunepeft.pareto import Point, front, hypervolume

SCHEMA_VERSION = 1
CLEAR = 5  # from so many pairs on nothing is said of their number
AXES = ("parameters", "steps", "seconds")
Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """One method with one seed at one cost.

    Attributes:
        method: Its name.
        cost: `own`: as the method is set; `equal`: at the steps of the reference.
        seed: Of splits, first values and order.
        run: The run folder.
        metric: Validation metric; None if the run failed.
        metrics: All metrics.
        n_params: Trainable parameters of the modules.
        used: Cost in the unit of the budget.
        n_modules: Modules that were kept.
        epochs: Of the retraining.
        search_steps, train_steps: Optimiser steps.
        search_seconds, train_seconds: Wall-clock time.
        peak_memory_bytes: Of search and training.
        continues: Whether the retraining goes on from weights of the search.
        allowance: Steps that search and retraining may take together; None at own cost.
        taken_over: Whether it is the run at own cost, since equal cost asks for the same.
        note: What was changed for equal cost.
        error: Why it failed.
        trace: Trials of a black-box search: steps so far, cost, metric.
    """

    method: str
    cost: str
    seed: int
    run: str = ""
    metric: float | None = None
    metrics: Mapping[str, float] | None = None
    n_params: int = 0
    used: float = 0
    n_modules: int = 0
    epochs: int = 0
    search_steps: int = 0
    train_steps: int = 0
    search_seconds: float = 0.0
    train_seconds: float = 0.0
    peak_memory_bytes: int = 0
    continues: bool = False
    allowance: int | None = None
    taken_over: bool = False
    note: str = ""
    error: str = ""
    trace: tuple[tuple[int, float, float], ...] = ()

    @property
    def steps(self) -> int:
        return self.search_steps + self.train_steps

    @property
    def seconds(self) -> float:
        return self.search_seconds + self.train_seconds

    @property
    def ratio(self) -> float | None:
        """Steps it took over those it was allowed."""
        return self.steps / self.allowance if self.allowance and self.metric is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"steps": self.steps, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cell":
        """Read what `to_dict` wrote."""
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(**known | {"trace": tuple(tuple(point) for point in data.get("trace", ()))})


def make_comparison(
    cells: Sequence[Cell], reference: str, *, greater_is_better: bool = True
) -> dict[str, Any]:
    """Everything that is said about the cells, as plain JSON values without NaN.

    Args:
        cells: Of two methods at least, in the order in which they are shown.
        reference: The method that the others are compared with.
        greater_is_better: Direction of the metric.
    Returns:
        `tables`: cost -> rows, fronts and hypervolume; the cells; and what to take from it.
    """
    sign = 1 if greater_is_better else -1
    costs = [c for c in ("own", "equal") if any(cell.cost == c for cell in cells)]
    tables = {}
    for cost in costs:
        here = [cell for cell in cells if cell.cost == cost]
        rows = _rows(here, reference, greater_is_better)
        tables[cost] = {
            "rows": rows,
            "fronts": fronts(rows, sign),
            "hypervolume": hypervolume_lines(here, sign),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": reference,
        "confidence": CONFIDENCE,
        "greater_is_better": greater_is_better,
        "methods": list(dict.fromkeys(cell.method for cell in cells)),
        "seeds": sorted({cell.seed for cell in cells}),
        "costs": costs,
        "tables": tables,
        "takeaways": takeaways(tables, reference),
        "cells": [cell.to_dict() for cell in cells],
    }


def _rows(cells: Sequence[Cell], reference: str, greater_is_better: bool) -> list[dict[str, Any]]:
    """One row per method."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    by_seed = {
        m: {c.seed: c for c in cells if c.method == m and c.metric is not None} for m in methods
    }
    base = by_seed.get(reference, {})
    gaps = {
        m: paired([found[s].metric - base[s].metric for s in sorted(found.keys() & base.keys())])
        for m, found in by_seed.items()
        if m != reference
    }
    corrected = holm({m: gap.p for m, gap in gaps.items()})
    rows = []
    for method, found in by_seed.items():
        row = _measured(method, list(found.values()))
        row["failed"] = sum(c.method == method and c.metric is None for c in cells)
        notes = [c.note for c in cells if c.method == method and c.note]
        row["notes"] = list(dict.fromkeys(notes))
        row["difference"], row["verdict"] = None, "reference"
        if method != reference:
            gap, p = gaps[method], corrected[method]
            row["difference"] = asdict(gap) | {"p_holm": p}
            row["verdict"] = verdict(gap, p, greater_is_better=greater_is_better)
        rows.append(row)
    return rows


def _measured(method: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Means over the seeds of what a method reached and what it took."""

    def mean(name: str) -> float | None:
        values = [getattr(cell, name) for cell in cells]
        known = [v for v in values if v is not None]
        return statistics.fmean(known) if known else None

    means = ("search_steps", "train_steps", "steps", "allowance", "ratio", "epochs", "n_modules")
    more = ("search_seconds", "train_seconds", "seconds", "peak_memory_bytes")
    return {
        "method": method,
        "metric": summary([cell.metric for cell in cells if cell.metric is not None]),
        "parameters": mean("n_params"),
        **{name: mean(name) for name in (*means, *more)},
    }


def fronts(rows: Sequence[Mapping[str, Any]], sign: int) -> dict[str, list[str]]:
    """For each cost the methods whose mean metric none beats at that cost, best metric first."""
    known = [row for row in rows if row["metric"]["mean"] is not None]
    found = {}
    for axis in AXES:
        points = [(-row[axis], sign * row["metric"]["mean"]) for row in known]
        found[axis] = [known[i]["method"] for i in front(points)]
    return found


def hypervolume_lines(cells: Sequence[Cell], sign: int) -> dict[str, Any]:
    """Area that a method dominates in (cost, metric) after so many steps, averaged over its seeds.

    A cell counts its trials, each after the steps that it took to get there, and its result at the
    end. One reference point, inferred from all cells, makes the lines comparable.
    """
    events = {
        (c.method, c.seed): [
            *((steps, (-cost, sign * metric)) for steps, cost, metric in c.trace),
            (c.steps, (-c.used, sign * c.metric)),
        ]
        for c in cells
        if c.metric is not None
    }
    if not events:
        return {"reference_point": None, "lines": {}}
    reference = below([point for event in events.values() for _, point in event])
    lines: dict[str, list[Line]] = {}
    for (method, _), event in events.items():
        lines.setdefault(method, []).append(_line(event, reference))
    if not all(math.isfinite(y) for found in lines.values() for line in found for _, y in line):
        return {"reference_point": None, "lines": {}}  # a diverged perplexity is too large for it
    return {
        "reference_point": [-reference[0], sign * reference[1]],
        "lines": {m: [list(point) for point in mean_line(found)] for m, found in lines.items()},
    }


def below(points: Sequence[Point]) -> Point:
    """A point a tenth of the range below the worst of all points, so that each rules some area.

    Example:
        >>> below([(-10, 0.8), (-20, 0.9), (-20, 0.7)])[0]
        -21.0
    """
    found = []
    for values in zip(*points, strict=True):
        worst, span = min(values), max(values) - min(values)
        found.append(worst - (span or abs(worst) or 1.0) / 10)
    return found[0], found[1]


def _line(events: Sequence[tuple[int, Point]], reference: Point) -> Line:
    """Steps and area after each event."""
    ordered = sorted(events, key=lambda event: event[0])
    points = [point for _, point in ordered]
    return [
        (float(steps), hypervolume(points[: i + 1], reference))
        for i, (steps, _) in enumerate(ordered)
    ]


def mean_line(lines: Sequence[Line]) -> Line:
    """Mean of step functions that are 0 before their first point.

    Example:
        >>> mean_line([[(10, 2.0)], [(5, 1.0), (20, 3.0)]])
        [(5, 0.5), (10, 1.5), (20, 2.5)]
    """
    places = sorted({x for line in lines for x, _ in line})
    values = [
        [max((y for at, y in line if at <= x), default=0.0) for line in lines] for x in places
    ]
    return [(x, statistics.fmean(at)) for x, at in zip(places, values, strict=True)]


def takeaways(tables: Mapping[str, Any], reference: str) -> list[str]:
    """The answer in a few sentences, no stronger than the tests."""
    words = {"own": "At each method's own cost", "equal": "At equal total compute"}
    found = []
    for cost, table in tables.items():
        rows = table["rows"]
        sentence = f"{words[cost]}: {_shown(rows, reference)}"
        on = table["fronts"]
        if on["steps"]:
            sentence += (
                f" Best first, on the front of metric and parameters: {', '.join(on['parameters'])}"
                f"; of metric and steps: {', '.join(on['steps'])}."
            )
        found.append(sentence)
        if most := [r for r in rows if r["steps"]]:
            least, dear = (f(most, key=lambda r: r["steps"]) for f in (min, max))
        if most and least["steps"] < dear["steps"]:
            found.append(
                f"{words[cost]}: steps of search and retraining range from {least['steps']:,.0f} "
                f"({least['method']}) to {dear['steps']:,.0f} ({dear['method']})."
            )
        if over := [r for r in rows if (r["ratio"] or 0) > 1]:
            listed = ", ".join(f"{r['method']} by {r['ratio']:.3g}x" for r in over)
            found.append(f"Over the allowance, so not an equal comparison: {listed}.")
        if failed := [f"{r['method']} ({r['failed']})" for r in rows if r["failed"]]:
            found.append(f"{words[cost]}, runs that failed: {', '.join(failed)}.")
    return found


def _shown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Which differences to the reference the tests show."""
    groups = {v: [r["method"] for r in rows if r["verdict"] == v] for v in ("ahead", "behind")}
    parts = [f"{', '.join(names)} {v} of {reference}" for v, names in groups.items() if names]
    parts = [p.replace("behind of", "behind") for p in parts]
    open_ = [r for r in rows if r["verdict"] == "no difference shown"]
    if not open_:
        return "; ".join(parts) + "."
    parts.append(f"no difference to {reference} shown for {', '.join(r['method'] for r in open_)}")
    text = "; ".join(parts) + "."
    if alone := [r["method"] for r in open_ if not r["difference"]["n"]]:
        text += f" No seed in common with {reference}: {', '.join(alone)}."
    pairs = min((r["difference"]["n"] for r in open_ if r["difference"]["n"]), default=CLEAR)
    if pairs == 1:
        return text + " One seed shows no difference, however large."
    return text + (f" {pairs} seeds show only large differences." if pairs < CLEAR else "")
