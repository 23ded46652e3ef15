"""Figures along an axis: removals by layer, learning curves, rounds, and what it all cost."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prunepeft.report.grid import Grid, Module, make_grid, plain, split_id
from prunepeft.report.plot_style import INK, MUTED, PALETTE, kind_colour
from prunepeft.report.record import Evidence, Result
from prunepeft.report.tables import OURS, metric_name, number, show

_MARKERS = "osD^vPX*"
_MAX_LINES = 24


def removal_shares(evidence: Evidence) -> Figure | None:
    """Per criterion: share of its warm-up removals that fell on each layer and kind."""
    warmup = evidence.history.warmup if evidence.history else None
    removed: dict[str, list[str]] = {}
    for turn in warmup.turns if warmup else []:
        removed.setdefault(turn.criterion, []).extend(turn.removed)
    removed = {name: ids for name, ids in sorted(removed.items())[:_MAX_LINES] if ids}
    if not removed:
        return None
    grid = _grid(evidence, (slot for ids in removed.values() for slot in ids))
    per_row = 1 if len(removed) == 1 else 2
    n_lines = math.ceil(len(removed) / per_row)
    figure = Figure(figsize=(4.8 * per_row, 0.5 + 1.55 * n_lines), layout=_layout())
    panels = figure.subplots(n_lines, per_row, sharex=True, sharey=True, squeeze=False)
    for axes, (name, ids) in zip(panels.flat, removed.items(), strict=False):
        _stack_by_layer(axes, grid, ids, 100 / len(ids))
        axes.set_title(plain(name, 30))
    for axes in panels.flat[len(removed) :]:
        axes.set_axis_off()
    for axes in [*panels[-1], *panels.flat[len(removed) - per_row : len(removed)]]:
        axes.set_xlabel("layer")
        axes.tick_params(labelbottom=True)
    figure.supylabel("share of the criterion's removals (%)", fontsize=9)
    _kind_legend(figure, grid)
    return figure


def removals_by_layer(evidence: Evidence) -> Figure | None:
    """All rounds: how many modules each layer lost, of how many candidates."""
    rounds = evidence.history.rounds if evidence.history else []
    ids = [slot for entry in rounds for slot in entry.removed]
    if not ids:
        return None
    grid = _grid(evidence, ids)
    figure = Figure(figsize=(max(6.4, min(0.26 * len(grid.rows) + 1.4, 11)), 2.9), layout=_layout())
    axes = figure.subplots()
    _stack_by_layer(axes, grid, ids, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("modules removed")
    handles = _kind_handles(grid)
    if evidence.space:
        candidates = Counter(row for row, _ in grid.where.values())
        heights = [candidates[row] for row in grid.rows]
        (line,) = axes.plot(range(len(heights)), heights, "_", color=INK, ms=9, mew=1.3)
        line.set_label("candidates")
        handles.append(line)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


def learning_curves(evidence: Evidence) -> Figure | None:
    """Training loss and validation metric by epoch, this run and its baselines."""
    result = evidence.result
    metric = metric_name(result)
    curves = [(OURS, result.train.curve)] + [(b.name, b.curve) for b in result.baselines]
    curves = [(name, curve) for name, curve in curves if curve][:_MAX_LINES]
    if not curves:
        return None
    figure = Figure(figsize=(9.2, 3.2), layout=_layout())
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("train_loss", metric),
        ("training loss", f"validation {metric}"),
        strict=True,
    ):
        for i, (name, curve) in enumerate(curves):
            _draw_curve(axes, curve, key, name, i)
        axes.set_xlabel("epoch")
        axes.set_title(label)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    best = result.metric.best_epoch
    point = [number(p.get(metric)) for p in result.train.curve if p.get("epoch") == best]
    if best is not None and point and point[0] is not None:
        ring = {"mfc": "none", "mec": INK, "mew": 1.2, "ls": "none", "label": "kept epoch"}
        axes.plot([best], point, "o", ms=11, zorder=5, **ring)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 4))
    return figure


def rounds_against_budget(evidence: Evidence) -> Figure | None:
    """Cost of the modules that remain after each round, down to the budget."""
    every = evidence.history.rounds if evidence.history else []
    rounds = [entry for entry in every if entry.cost_after is not None]
    if not rounds:
        return None
    budget = evidence.result.budget
    start = rounds[0].cost_before
    points = [(rounds[0].round - 1, start)] if start is not None else []
    points += [(r.round, r.cost_after) for r in rounds]
    figure = Figure(figsize=(6.4, 3.0), layout=_layout())
    axes = figure.subplots()
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axes.plot(xs, ys, "-o", color=PALETTE[0], lw=1.8, label="modules that remain")
    for entry in rounds:
        text, place = f"−{len(entry.removed)}", (entry.round, entry.cost_after)
        axes.annotate(text, place, (5, 6), textcoords="offset points", fontsize=8, color=MUTED)
    if budget.limit:
        label = f"budget {plain(budget.text, 20)} = {budget.limit:,.0f}"
        axes.axhline(budget.limit, color=PALETTE[4], ls="--", lw=1.4, label=label)
    names = {"parameters": "trainable parameters", "rank": "sum of ranks"}
    axes.set_ylabel(names.get(budget.unit, plain(budget.unit, 24)))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_ylim(0, max([*ys, budget.limit or 0]) * 1.12 or 1)
    axes.set_xlabel("round (0: every candidate)" if xs[0] == 0 else "round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def cost_bars(evidence: Evidence) -> Figure | None:
    """Seconds of search and of training, this run above its baselines."""
    rows = _cost_rows(evidence.result)
    if not rows:
        return None
    figure = Figure(figsize=(8.2, 0.95 + 0.42 * len(rows)), layout=_layout())
    axes = figure.subplots()
    longest = max(search + train for _, search, train in rows) or 1.0
    for y, (_, search, train) in enumerate(rows):
        names = ("search", "training") if y == 0 else (None, None)
        axes.barh(y, search, 0.62, color=PALETTE[1], label=names[0])
        axes.barh(y, train, 0.62, left=search, color=PALETTE[0], label=names[1])
        text = show(search + train, "seconds")
        if search:
            text += f"  ({show(search, 'seconds')} search)"
        axes.annotate(text, (search + train, y), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [plain(name, 34) for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.42)
    axes.set_xlabel("seconds")
    axes.grid(axis="x")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _cost_rows(result: Result) -> list[tuple[str, float, float]]:
    own = (OURS, number(result.search.seconds) or 0.0, number(result.train.seconds) or 0.0)
    others = [(b.name, 0.0, number(b.seconds)) for b in result.baselines]
    known = [(name, search, train) for name, search, train in others if train is not None]
    return (([own] if own[1] + own[2] > 0 else []) + known)[:_MAX_LINES]


def _grid(evidence: Evidence, ids: Iterable[str]) -> Grid:
    return make_grid([Module(i, *split_id(i), size=1) for i in sorted(set(ids))], evidence.space)


def _stack_by_layer(axes: Axes, grid: Grid, ids: Sequence[str], weight: float) -> None:
    """Bars over the layers, one colour per kind, each id worth `weight`."""
    counts = Counter((split_id(slot)[0], split_id(slot)[1][2]) for slot in ids)
    floor = [0.0] * len(grid.rows)
    for kind in grid.kinds:
        heights = [counts[row, kind] * weight for row in grid.rows]
        colour = kind_colour(kind, grid.kinds)
        axes.bar(range(len(floor)), heights, 0.78, bottom=floor, color=colour)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    labels = grid.layer_labels()
    step = max(1, math.ceil(len(labels) / 16))
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(axis="y")
    for i in range(1, len(grid.rows)):
        if grid.rows[i][0] != grid.rows[i - 1][0]:
            axes.axvline(i - 0.5, color=MUTED, lw=0.8, ls=":")


def _draw_curve(axes: Axes, curve: Sequence[dict], key: str, name: str, index: int) -> None:
    points = [(number(p.get("epoch")), number(p.get(key))) for p in curve]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    style = {"color": PALETTE[index % len(PALETTE)], "marker": _MARKERS[index % len(_MARKERS)]}
    width = 2.2 if index == 0 else 1.4
    axes.plot(
        [x for x, _ in known],
        [y for _, y in known],
        ls="-" if index == 0 else "--",
        lw=width,
        ms=5,
        label=plain(name, 34),
        **style,
    )


def _kind_handles(grid: Grid) -> list:
    return [Patch(facecolor=kind_colour(k, grid.kinds), label=plain(k, 24)) for k in grid.kinds]


def _kind_legend(figure: Figure, grid: Grid) -> None:
    handles = _kind_handles(grid)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07)


def _thousands(value: float, _position: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
