"""Figures that explain the choice: saliency, and which criterion got which partition."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunepeft.report.grid import Grid, Module, column_label, make_grid, plain, split_id
from prunepeft.report.plot_style import (
    LINE,
    PALETTE,
    PAPER,
    axes_at,
    clear,
    spread,
    text_on,
    tint,
)
from prunepeft.report.record import Evidence, Round

_DEPTHS = {"0": "0–20 %", "1": "20–50 %", "2": "50–80 %", "3": "80–100 %"}
_MAX_PANELS, _MAX_PARTITIONS = 24, 64
_Place = tuple[int, int]  # column, row


def saliency_map(evidence: Evidence, index: int = -1) -> Figure | None:
    """One panel per criterion: saliency of every module in one round, min-max normalised.

    Args:
        evidence: The run.
        index: Which round, as in a list; the last by default.
    """
    rounds = [r for r in evidence.history.rounds if r.saliency] if evidence.history else []
    if not rounds:
        return None
    chosen = rounds[index]
    grid = make_grid((), evidence.space) if evidence.space else _grid_of_ids(chosen)
    names = sorted(chosen.saliency)[:_MAX_PANELS]
    wide = len(grid.rows) > 40
    per_row = 1 if wide or len(names) == 1 else 2
    n_lines = math.ceil(len(names) / per_row)
    width = min(0.17 * len(grid.rows), 9.6) if wide else 4.3
    height = max(0.21 * len(grid.columns), 0.45)
    label = 0.35 + 0.068 * max(len(column_label(column)) for column in grid.columns)
    total = label + per_row * width + (per_row - 1) * 0.3 + 0.95
    figure = Figure(figsize=(total, 0.55 + n_lines * (height + 0.42) + 0.1))
    for number, name in enumerate(names):
        line, place = divmod(number, per_row)
        bottom = 0.55 + (n_lines - 1 - line) * (height + 0.42)
        axes = axes_at(figure, label + place * (width + 0.3), bottom, width, height)
        _draw_saliency(axes, grid, chosen, name)
        labels = [] if place else [column_label(c) for c in grid.columns]
        axes.set_yticks(range(len(labels)), labels)
        if number + per_row >= len(names):
            axes.set_xlabel("layer")
    _draw_scale(figure, total)
    return figure


def partition_map(evidence: Evidence) -> Figure | None:
    """Criteria by partitions: how many removals the warm-up counted, and what was assigned."""
    history = evidence.history
    if history is None or not history.strategy:
        return None
    tendency = history.warmup.tendency if history.warmup else {}
    criteria = sorted({c for found in history.strategy.values() for c in found} | set(tendency))
    everywhere = set(history.strategy) | {p for counts in tendency.values() for p in counts}
    partitions = sorted(everywhere, key=_partition_order)[:_MAX_PARTITIONS]
    xs = spread([_partition_order(p)[:2] for p in partitions])
    width, height = 0.74 * (xs[-1] + 1), 0.34 * len(criteria)
    left = 0.35 + 0.075 * max(len(plain(c, 30)) for c in criteria)
    figure = Figure(figsize=(max(left + width + 0.2, 6.2), height + 1.15))
    axes = axes_at(figure, left, 0.72, width, height)
    most = max((n for counts in tendency.values() for n in counts.values()), default=0) or 1
    for y, criterion in enumerate(criteria):
        for x, partition in zip(xs, partitions, strict=True):
            count = tendency.get(criterion, {}).get(partition, 0)
            chosen = criterion in history.strategy.get(partition, ())
            _draw_count(axes, x, y, count, most, chosen, bool(tendency))
    axes.set_xticks(xs, [_depth_label(p) for p in partitions])
    axes.set_yticks(range(len(criteria)), [plain(c, 30) for c in criteria])
    clear(axes, (-0.5, xs[-1] + 0.5), (len(criteria) - 0.5, -0.5))
    _head_groups(axes, partitions, xs)
    note = "outlined: criterion assigned to the partition"
    if tendency:
        note = "number: modules the criterion removed there in the warm-up;  " + note
    axes.set_xlabel(f"depth\n{note}", fontsize=8)
    axes.xaxis.set_label_coords(0, -0.27 / height)
    axes.xaxis.label.set_ha("left")
    return figure


def _draw_saliency(axes: Axes, grid: Grid, chosen: Round, name: str) -> None:
    x = {row: i for i, row in enumerate(grid.rows)}
    y = {column: i for i, column in enumerate(grid.columns)}
    places = {
        slot: (y[column], x[row])
        for slot, (row, column) in grid.where.items()
        if row in x and column in y
    }
    values = {
        places[slot]: value
        for slot, value in chosen.saliency[name].items()
        if value is not None and math.isfinite(value) and slot in places
    }
    levels = normalised(values)
    _mesh(axes, dict.fromkeys(places.values(), 0.0), ListedColormap([LINE]))
    _mesh(axes, levels, matplotlib.colormaps["cividis"])
    gone = [places[slot] for slot in chosen.removed if slot in places and places[slot] in levels]
    size = 20 if len(grid.rows) <= 40 else 9
    for dark in (True, False):
        marks = [place for place in gone if (levels[place] > 0.55) == dark]
        colour = "#111111" if dark else "#ffffff"
        xs, ys = [mark[1] for mark in marks], [mark[0] for mark in marks]
        axes.scatter(xs, ys, s=size, color=colour, marker="x", linewidths=1.1)
    constant = bool(values) and len(set(values.values())) == 1
    axes.set_title(plain(name, 30) + (" (all equal)" if constant else ""), pad=4)
    labels = grid.layer_labels()
    step = max(1, math.ceil(len(labels) / 16))
    axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize=7.5)
    clear(axes, (-0.5, len(grid.rows) - 0.5), (len(grid.columns) - 0.5, -0.5))


def normalised(values: Mapping[_Place, float]) -> dict[_Place, float]:
    """Min-max to [0, 1]; 0.5 for all if they are equal."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    if not high > low:
        return dict.fromkeys(values, 0.5)
    half = high / 2 - low / 2  # of the span, which itself may be too large for a float
    return {place: (value / 2 - low / 2) / half for place, value in values.items()}


def _mesh(axes: Axes, levels: Mapping[_Place, float], colours: Colormap) -> None:
    """One coloured cell for each place."""
    cells = [Rectangle((x - 0.5, y - 0.5), 1, 1) for y, x in levels]
    faces = [colours(level) for level in levels.values()]
    axes.add_collection(PatchCollection(cells, facecolors=faces, edgecolors=PAPER, linewidths=0.5))


def _draw_scale(figure: Figure, width: float) -> None:
    """The colour scale at the right edge."""
    height = min(2.0, figure.get_size_inches()[1] - 1.0)
    axes = axes_at(figure, width - 0.62, 0.55, 0.13, height)
    colours = matplotlib.colormaps["cividis"]
    for i in range(64):
        axes.add_patch(Rectangle((0, i / 64), 1, 1 / 64, color=colours(i / 63), lw=0.4))
    clear(axes, (0, 1), (0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 1], ["low", "high"])
    axes.yaxis.tick_right()
    axes.tick_params(length=0)


def _draw_count(
    axes: Axes, x: float, y: float, count: float, most: float, chosen: bool, counted: bool
) -> None:
    colour = tint(PALETTE[0], 0.06 + 0.8 * count / most if counted else 0.35 * chosen)
    corner = (x - 0.47, y - 0.44)
    axes.add_patch(Rectangle(corner, 0.94, 0.88, facecolor=colour, edgecolor="none"))
    if chosen:
        edge = {"edgecolor": PALETTE[4], "facecolor": "none", "lw": 2.0}
        axes.add_patch(Rectangle((x - 0.45, y - 0.41), 0.9, 0.82, **edge))
    if counted:
        style = {"fontsize": 8, "ha": "center", "va": "center", "color": text_on(colour)}
        axes.text(x, y, f"{count:g}", weight="bold" if chosen else "normal", **style)


def _partition_order(partition: str) -> tuple[str, str, str]:
    """Kind, stack and depth block of a partition name such as `encoder.2.lora`."""
    stack, _, rest = partition.partition(".")
    depth, _, kind = rest.partition(".")
    return kind, stack, depth


def _depth_label(partition: str) -> str:
    depth = _partition_order(partition)[2]
    return _DEPTHS.get(depth, plain(depth, 8))


def _head_groups(axes: Axes, partitions: Sequence[str], xs: Sequence[float]) -> None:
    """Names the kind, and the stack if there are several, above each group of columns."""
    order = [_partition_order(p) for p in partitions]
    several = len({stack for _, stack, _ in order}) > 1
    for group in dict.fromkeys(key[:2] for key in order):
        places = [x for x, key in zip(xs, order, strict=True) if key[:2] == group]
        kind, stack = plain(group[0], 20), plain(group[1], 12)
        text = f"{stack} · {kind}" if several else kind
        axes.text((places[0] + places[-1]) / 2, -0.62, text, ha="center", weight="bold")


def _grid_of_ids(chosen: Round) -> Grid:
    ids = {slot for scores in chosen.saliency.values() for slot in scores}
    return make_grid([Module(slot, *split_id(slot), size=1) for slot in sorted(ids)])
