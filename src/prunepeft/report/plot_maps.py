"""Figures that are maps: kept modules, saliency, and which criterion got which partition."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from prunepeft.report.grid import Column, Grid, Module, Row, make_grid, modules_of, plain, split_id
from prunepeft.report.plot_style import (
    LINE,
    MUTED,
    PALETTE,
    PAPER,
    axes_at,
    kind_colour,
    text_on,
    tint,
)
from prunepeft.report.record import Evidence, Round

DEPTHS = {"0": "0–20 %", "1": "20–50 %", "2": "50–80 %", "3": "80–100 %"}
_Place = tuple[int, int]  # column, row

_GAP = 0.25  # between stacks and between blocks, in cells
_MAX_TEXT_ROWS = 64
_FEW_COLUMNS = 6


@dataclass(frozen=True)
class _Layout:
    """Where rows and columns lie, in cells, and how large a cell is, in inches."""

    y: Mapping[Row, float]
    x: Mapping[Column, float]
    cell: tuple[float, float]

    @property
    def size(self) -> tuple[float, float]:
        return max(self.x.values()) + 1, max(self.y.values()) + 1


def kept_map(evidence: Evidence) -> Figure | None:
    """Rows are layers, columns are places and kinds; a cell holds the size of the kept module."""
    modules = modules_of(evidence)
    if not modules:
        return None
    grid = make_grid(modules, evidence.space, evidence.kept)
    few = len(grid.columns) <= _FEW_COLUMNS
    layout = _layout(grid, 1.15 if few else 0.46)
    columns, rows = layout.size
    width, height = columns * layout.cell[0], rows * layout.cell[1]
    left, below, above, bar = 0.95, 0.95, 0.75 if few else 1.65, 1.9
    figure = Figure(figsize=(max(left + width + 0.3 + bar + 0.25, 6.0), below + height + above))
    cells = axes_at(figure, left, below, width, height)
    _frame_map(cells, grid, layout, few)
    _draw_cells(cells, grid, layout, modules)
    side = axes_at(figure, left + width + 0.3, below, bar, height)
    _draw_side_bar(side, grid, layout, modules)
    handles = [Patch(facecolor=tint(kind_colour(k, grid.kinds), 0.8), label=k) for k in grid.kinds]
    handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch="//////", label="removed"))
    figure.legend(handles=handles, loc="lower left", ncols=len(handles), bbox_to_anchor=(0.0, 0.0))
    return figure


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
    names = sorted(chosen.saliency)
    wide = len(grid.rows) > 40
    per_row = 1 if wide or len(names) == 1 else 2
    n_lines = math.ceil(len(names) / per_row)
    width = min(0.17 * len(grid.rows), 9.6) if wide else 4.3
    height = max(0.21 * len(grid.columns), 0.45)
    label = 0.35 + 0.068 * max(len(_flat(column)) for column in grid.columns)
    total = label + per_row * width + (per_row - 1) * 0.3 + 0.95
    figure = Figure(figsize=(total, 0.55 + n_lines * (height + 0.42) + 0.1))
    for number, name in enumerate(names):
        line, place = divmod(number, per_row)
        bottom = 0.55 + (n_lines - 1 - line) * (height + 0.42)
        axes = axes_at(figure, label + place * (width + 0.3), bottom, width, height)
        _draw_saliency(axes, grid, chosen, name)
        axes.set_yticks(range(len(grid.columns)), [_flat(c) for c in grid.columns] if not place else [])
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
    partitions = sorted(everywhere, key=_partition_order)
    xs = _spread([_partition_order(p)[:2] for p in partitions])
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
    _clear(axes, (-0.5, xs[-1] + 0.5), (len(criteria) - 0.5, -0.5))
    _head_groups(axes, partitions, xs)
    note = "outlined: criterion assigned to the partition"
    if tendency:
        note = "number: modules the criterion removed there in the warm-up;  " + note
    axes.set_xlabel(f"depth\n{note}", fontsize=8)
    axes.xaxis.set_label_coords(0, -0.27 / height)
    axes.xaxis.label.set_ha("left")
    return figure


def _layout(grid: Grid, cell_width: float) -> _Layout:
    y = _spread([stack for stack, _ in grid.rows])
    x = _spread([block for block, _, _ in grid.columns])
    cell = (cell_width, min(0.3, max(0.09, 7.5 / len(grid.rows))))
    return _Layout(dict(zip(grid.rows, y, strict=True)), dict(zip(grid.columns, x, strict=True)), cell)


def _spread(groups: Sequence[object]) -> list[float]:
    """Positions 0, 1, ... with a gap wherever the group changes."""
    places, offset = [], 0.0
    for i, group in enumerate(groups):
        offset += _GAP if i and group != groups[i - 1] else 0.0
        places.append(i + offset)
    return places


def _frame_map(axes: Axes, grid: Grid, layout: _Layout, few: bool) -> None:
    columns, rows = layout.size
    _clear(axes, (0, columns), (rows, 0))
    axes.xaxis.tick_top()
    names = [f"{plain(c[1], 24)}\n{plain(c[2], 18)}" if few else _flat(c, block=False) for c in grid.columns]
    axes.set_xticks([layout.x[c] + 0.5 for c in grid.columns], names)
    if not few:
        axes.tick_params(axis="x", labelrotation=90)
    step = max(1, round(0.13 / layout.cell[1]))
    shown = [row for row in grid.rows if row[1] % step == 0]
    axes.set_yticks([layout.y[row] + 0.5 for row in shown], [str(row[1]) for row in shown])
    for stack in grid.stacks:
        middle = [layout.y[row] + 0.5 for row in grid.rows if row[0] == stack]
        place = (-0.62 / layout.cell[0], sum(middle) / len(middle))
        axes.text(*place, f"{plain(stack, 20)} layer", rotation=90, ha="center", va="center")
    for block in dict.fromkeys(column[0] for column in grid.columns):
        xs = [layout.x[c] for c in grid.columns if c[0] == block]
        top = -(0.5 if few else 1.38) / layout.cell[1]
        axes.text((xs[0] + xs[-1] + 1) / 2, top, plain(block, 20), ha="center", weight="bold")


def _draw_cells(axes: Axes, grid: Grid, layout: _Layout, modules: Sequence[Module]) -> None:
    kept = {(m.row, m.column): m for m in modules}
    largest = {k: max(m.size for m in modules if m.kind == k) for k in {m.kind for m in modules}}
    for row, column in grid.where.values():
        if row not in layout.y or column not in layout.x:
            continue
        corner = (layout.x[column] + 0.03, layout.y[row] + 0.06)
        module = kept.get((row, column))
        if module is None:
            axes.add_patch(
                Rectangle(corner, 0.94, 0.88, facecolor="none", edgecolor=LINE, hatch="//////", lw=0.6)
            )
            continue
        strength = 0.35 + 0.65 * module.size / largest[module.kind]
        colour = tint(kind_colour(module.kind, grid.kinds), strength)
        axes.add_patch(Rectangle(corner, 0.94, 0.88, facecolor=colour, edgecolor="none"))
        if len(grid.rows) <= _MAX_TEXT_ROWS:
            place = (corner[0] + 0.47, corner[1] + 0.46)
            style = {"fontsize": 7.5, "ha": "center", "va": "center"}
            axes.text(*place, str(module.size), color=text_on(colour), **style)


def _draw_side_bar(axes: Axes, grid: Grid, layout: _Layout, modules: Sequence[Module]) -> None:
    known = all(m.n_params is not None for m in modules)
    ends = dict.fromkeys(grid.rows, 0.0)
    for kind in grid.kinds:
        for row in grid.rows:
            here = [m for m in modules if m.row == row and m.kind == kind]
            amount = sum(m.n_params or 0 for m in here) / 1000 if known else len(here)
            if amount:
                colour = tint(kind_colour(kind, grid.kinds), 0.8)
                axes.barh(layout.y[row] + 0.5, amount, 0.8, left=ends[row], color=colour)
                ends[row] += amount
    axes.set_ylim(layout.size[1], 0)
    axes.set_yticks([])
    axes.set_xlim(0, (max(ends.values()) or 1) * 1.08)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("trainable parameters (thousand)" if known else "kept modules", fontsize=8)


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
        axes.scatter([m[1] for m in marks], [m[0] for m in marks], size, colour, "x", linewidths=1.1)
    constant = bool(values) and len(set(values.values())) == 1
    axes.set_title(plain(name, 30) + (" (all equal)" if constant else ""), pad=4)
    labels = grid.layer_labels()
    step = max(1, math.ceil(len(labels) / 16))
    axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize=7.5)
    _clear(axes, (-0.5, len(grid.rows) - 0.5), (len(grid.columns) - 0.5, -0.5))


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
        axes.add_patch(Rectangle((0, i / 64), 1, 1 / 64, facecolor=colours(i / 63), edgecolor="none"))
    _clear(axes, (0, 1), (0, 1))
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


def _clear(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Axes of a map: limits, no frame, no tick marks."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _flat(column: Column, *, block: bool = True) -> str:
    text = f"{plain(column[1], 24)} · {plain(column[2], 18)}"
    return f"{plain(column[0], 18)} {text}" if block and column[0] == "cross_attention" else text


def _partition_order(partition: str) -> tuple[str, str, str]:
    """Kind, stack and depth block of a partition name such as `encoder.2.lora`."""
    stack, _, rest = partition.partition(".")
    depth, _, kind = rest.partition(".")
    return kind, stack, depth


def _depth_label(partition: str) -> str:
    depth = _partition_order(partition)[2]
    return DEPTHS.get(depth, plain(depth, 8))


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
