"""All figures of a report, drawn and encoded."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from prunepeft.report.plot_kept import kept_map
from prunepeft.report.plot_maps import partition_map, saliency_map
from prunepeft.report.plot_series import (
    cost_bars,
    learning_curves,
    removal_shares,
    removals_by_layer,
    rounds_against_budget,
)
from prunepeft.report.plot_style import inline_svg, png_bytes, styled, svg_bytes
from prunepeft.report.record import Evidence


@dataclass(frozen=True)
class Picture:
    """One figure in the three forms a report needs."""

    name: str
    title: str
    caption: str
    inline: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    draw: Callable[[Evidence], Figure | None]
    caption: str


_PLANS = (
    _Plan(
        "kept_modules",
        "Kept modules and their sizes",
        kept_map,
        "Rows are layers, layer 0 nearest the input. The number is the rank or width of a kept "
        "module, a stronger colour a larger one of its kind; hatched candidates were removed.",
    ),
    _Plan(
        "learning_curves",
        "Learning curves",
        learning_curves,
        "The final training from fresh weights, beside the baselines.",
    ),
    _Plan(
        "cost",
        "Time spent",
        cost_bars,
        "Wall-clock seconds on the machine that is named under Record.",
    ),
    _Plan(
        "rounds",
        "Rounds against the budget",
        rounds_against_budget,
        "Cost of the modules that remain after each round; the number beside a point is how many "
        "modules that round removed.",
    ),
    _Plan(
        "removals_by_layer",
        "Removals by layer",
        removals_by_layer,
        "All rounds together, by kind. A dash marks how many candidates a layer had.",
    ),
    _Plan(
        "partitions",
        "Which criterion judged which partition",
        partition_map,
        "A partition is one depth range of one kind; the outlined criteria judge its modules.",
    ),
    _Plan(
        "warmup_removals",
        "What each criterion removes in the warm-up",
        removal_shares,
        "Share of a criterion's own removals by layer and kind, over its warm-up turns.",
    ),
    _Plan(
        "saliency_first_round",
        "Saliency by criterion, first round",
        lambda evidence: saliency_map(evidence, 0),
        "Every candidate, normalised per criterion: low goes first. A cross marks what this round "
        "removed.",
    ),
    _Plan(
        "saliency_last_round",
        "Saliency by criterion, last round",
        lambda evidence: saliency_map(evidence) if _n_scored(evidence) > 1 else None,
        "The modules that were still there; grey places had gone before.",
    ),
)


def make_pictures(evidence: Evidence) -> list[Picture]:
    """Every figure there is evidence for. The same evidence gives the same bytes."""
    pictures = []
    with styled():
        for plan in _PLANS:
            figure = plan.draw(evidence)
            if figure is None:
                continue
            svg, png = svg_bytes(figure), png_bytes(figure)
            inline = inline_svg(svg, plan.name, plan.title)
            pictures.append(Picture(plan.name, plan.title, plan.caption, inline, svg, png))
    return pictures


def _n_scored(evidence: Evidence) -> int:
    """Number of rounds in which saliency was recorded."""
    return sum(bool(entry.saliency) for entry in evidence.history.rounds) if evidence.history else 0
