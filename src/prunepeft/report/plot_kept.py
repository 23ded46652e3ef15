"""The figure of what was kept: a map of modules, and trainable parameters by layer beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from prunepeft.report.grid import (
    Column,
    Grid,
    Module,
    Row,
    make_grid,
    modules_of,
    plain,
)
from prunepeft.report.plot_style import (
    LINE,
    MUTED,
    axes_at,
    clear,
    kind_colour,
    spread,
    text_on,
    tint,
)
from prunepeft.report.record import Evidence

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


def _layout(grid: Grid, cell_width: float) -> _Layout:
    y = spread([stack for stack, _ in grid.rows])
    x = spread([block for block, _, _ in grid.columns])
    cell = (cell_width, min(0.3, max(0.09, 7.5 / len(grid.rows))))
    rows, columns = zip(grid.rows, y, strict=True), zip(grid.columns, x, strict=True)
    return _Layout(dict(rows), dict(columns), cell)


def _frame_map(axes: Axes, grid: Grid, layout: _Layout, few: bool) -> None:
    columns, rows = layout.size
    clear(axes, (0, columns), (rows, 0))
    axes.xaxis.tick_top()
    names = [
        f"{plain(roles, 24)}\n{plain(kind, 18)}"
        if few
        else f"{plain(roles, 24)} · {plain(kind, 18)}"
        for _, roles, kind in grid.columns
    ]
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
            style = {"facecolor": "none", "edgecolor": LINE, "hatch": "//////", "lw": 0.6}
            axes.add_patch(Rectangle(corner, 0.94, 0.88, **style))
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
