"""The pictures of a comparison: fronts of metric and cost, and hypervolume over steps."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from prunepeft.report.grid import plain
from prunepeft.report.plot_style import (
    INK,
    MUTED,
    PALETTE,
    inline_svg,
    png_bytes,
    styled,
    svg_bytes,
)
from prunepeft.report.plots import Picture

_MARKERS = "osD^vPX*<>hd"
_AXES = {"parameters": "trainable parameters", "steps": "steps in all", "seconds": "seconds in all"}


def comparison_pictures(comparison: Mapping[str, Any], cost: str) -> list[Picture]:
    """Fronts and hypervolume at one cost; nothing if no run succeeded."""
    pictures = []
    with styled():
        for name, title, draw, caption in _PLANS:
            figure = draw(comparison, cost)
            if figure is not None:
                svg, png = svg_bytes(figure), png_bytes(figure)
                inline = inline_svg(svg, f"{name}_{cost}", title)
                pictures.append(Picture(f"{name}-{cost}", title, caption, inline, svg, png))
    return pictures


def draw_fronts(comparison: Mapping[str, Any], cost: str) -> Figure | None:
    """Mean metric of each method over parameters, steps and seconds."""
    table = comparison["tables"][cost]
    rows = [row for row in table["rows"] if row["metric"]["n"]]
    if not rows:
        return None
    figure = Figure(figsize=(10.2, 3.9), layout=_layout())
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for axes, (axis, label) in zip(panels, _AXES.items(), strict=True):
        for row in rows:
            place = (row[axis], row["metric"]["mean"])
            error = row["metric"]["std"] or 0
            style = _style(comparison, row["method"])
            axes.errorbar(*place, yerr=error, ls="", ms=7, elinewidth=0.9, capsize=2, **style)
        _draw_front(axes, rows, axis, table["fronts"][axis])
        axes.set_xlabel(label)
        axes.grid()
        axes.margins(x=0.12, y=0.1)
    panels[0].set_ylabel(plain(comparison["metric"], 40))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 6))
    return figure


def _draw_front(axes: Axes, rows: list[dict[str, Any]], axis: str, names: list[str]) -> None:
    """A line in steps through the methods on the front."""
    by_name = {row["method"]: row for row in rows}
    points = sorted((by_name[n][axis], by_name[n]["metric"]["mean"]) for n in names)
    x, y = zip(*points, strict=True)
    axes.step(x, y, where="post", color=MUTED, lw=1.1, ls="--", zorder=0, label="front")


def draw_hypervolume(comparison: Mapping[str, Any], cost: str) -> Figure | None:
    """Dominated area after so many steps, a line per method."""
    lines = comparison["tables"][cost]["hypervolume"]["lines"]
    if not lines:
        return None
    figure = Figure(figsize=(8.2, 3.8), layout=_layout())
    axes = figure.subplots()
    end = max(x for line in lines.values() for x, _ in line)
    for method, line in lines.items():
        x = [point[0] for point in line]
        y = [point[1] for point in line]
        style = _style(comparison, method) | {"ms": 4 if len(x) > 1 else 6}
        axes.step([*x, end], [*y, y[-1]], where="post", lw=1.5, markevery=range(len(x)), **style)
    axes.set_xlabel("steps of search and retraining")
    axes.set_ylabel("hypervolume")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=min(len(lines), 6))
    return figure


def _style(comparison: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The same colour and marker for a method in all pictures; the reference is black."""
    at = comparison["methods"].index(method)
    colour = INK if method == comparison["reference"] else PALETTE[at % len(PALETTE)]
    return {"color": colour, "marker": _MARKERS[at % len(_MARKERS)], "label": plain(method, 24)}


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07)


_PLANS = (
    (
        "fronts",
        "Metric and cost",
        draw_fronts,
        "Means over the seeds; bars are one standard deviation. The dashed line joins the methods "
        "that no other beats in both.",
    ),
    (
        "hypervolume",
        "Hypervolume over steps",
        draw_hypervolume,
        "Area above one reference point that a method dominates in budget used and metric, mean of "
        "its seeds. A black-box search counts each trial, at the fidelity of a trial; every method "
        "counts its result after the retraining. Other methods know nothing before.",
    ),
)
