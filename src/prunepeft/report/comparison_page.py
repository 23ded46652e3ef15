"""The page of a comparison, its table in Markdown, and what goes to the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunepeft.report.comparison_tables import COST_WORDS, cells_table, comparison_tables
from prunepeft.report.grid import plain
from prunepeft.report.page import render
from prunepeft.report.plot_comparison import comparison_pictures
from prunepeft.report.render import escape_markdown, to_csv, to_markdown, to_text
from prunepeft.state import write_bytes, write_json, write_text

_PARTS = ("fronts", "hypervolume", "quality", "took")
TERMINAL = ("method", "difference", "95% low", "95% high", "verdict", "parameters")


def write_comparison(output: Path, comparison: Mapping[str, Any]) -> Path:
    """Write compare.json, compare.md, figures, tables and compare.html.

    The same comparison gives the same bytes.

    Args:
        output: Folder of the comparison.
        comparison: What `prunepeft.compare.compare` returns.
    Returns:
        The page.
    """
    pictures = {cost: comparison_pictures(comparison, cost) for cost in comparison["tables"]}
    tables = comparison_tables(comparison)
    page = render(
        "compare.html.jinja",
        comparison=comparison,
        tables=tables,
        pictures=pictures,
        cells=cells_table(comparison),
        words=COST_WORDS,
        how=how_compared(comparison),
        budget=budget_words(comparison),
    )
    for old in ("figures", "tables"):  # of costs that are no longer shown
        for file in (output / old).glob("*-*.*"):
            if file.stem in {f"{name}-{cost}" for name in _PARTS for cost in COST_WORDS}:
                file.unlink()
    for picture in (p for found in pictures.values() for p in found):
        write_bytes(output / "figures" / f"{picture.name}.svg", picture.svg)
        write_bytes(output / "figures" / f"{picture.name}.png", picture.png)
    for table in (*(t for found in tables.values() for t in found), cells_table(comparison)):
        write_text(output / "tables" / f"{table.name}.csv", to_csv(table))
    write_json(output / "compare.json", comparison)
    write_text(output / "compare.md", comparison_markdown(comparison))
    write_text(output / "compare.html", page)
    return output / "compare.html"


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The answer and the tables as Markdown."""
    parts = [f"# {escape_markdown(_title(comparison))}", budget_words(comparison)]
    parts += ["\n".join(f"- {escape_markdown(line)}" for line in comparison["takeaways"])]
    for tables in comparison_tables(comparison).values():
        for table in tables:
            parts += [f"## {table.title}", to_markdown(table), escape_markdown(table.note)]
    parts += [escape_markdown(line) for line in how_compared(comparison)]
    return "\n\n".join(parts) + "\n"


def comparison_summary(comparison: Mapping[str, Any], output: Path | None) -> str:
    """What the command line prints when a comparison ends."""
    lines = []
    for tables in comparison_tables(comparison).values():
        quality, took = tables
        shown = quality.select(*TERMINAL, comparison["metric"], "std", "seeds")
        lines += [quality.title, to_text(shown), ""]
        names = ("method", "search steps", "retraining steps", "of allowance", "changed")
        lines += [took.title, to_text(took.select(*names)), ""]
    lines += [*comparison["takeaways"]]
    if output is not None:
        lines += ["", f"page      {output}/compare.html"]
    return "\n".join(lines)


def how_compared(comparison: Mapping[str, Any]) -> list[str]:
    """How the comparison was made, in words."""
    reference = comparison["reference"]
    lines = [
        "All methods have the same rows, budget, batch size and, with the same seed, the same "
        "splits. The metric is that of the best epoch on the validation rows, which also choose "
        "among trials, so it flatters every method; a test split was not looked at."
    ]
    if "equal" in comparison["tables"]:
        lines.append(
            f"Equal compute: search and retraining together may take the optimiser steps that "
            f"{reference} takes with the same seed at its own cost. A black-box search spends all "
            "but the retraining on trials. A method that takes more searches on fewer rows; one "
            "that takes less trains what it found for more whole epochs. Where that changes "
            "nothing, the run at own cost is taken over. Steps of a search over all candidates "
            "are dearer in seconds than those of a few modules, so look at the seconds too."
        )
    return lines


def budget_words(comparison: Mapping[str, Any]) -> str:
    """Task, model, budget and seeds in one sentence."""
    budget, task = comparison["budget"], comparison["task"]
    seeds = ", ".join(map(str, comparison["seeds"]))
    return (
        f"{plain(task['name'])}, {task['n_train']:,} training and {task['n_validation']:,} "
        f"validation rows, budget {budget['limit']:,.0f} {plain(budget['unit'])}, seeds {seeds}."
    )


def _title(comparison: Mapping[str, Any]) -> str:
    model, data = comparison["model"]["name"], comparison["data"]["source"]
    return f"Searches compared: {Path(model).name} on {Path(data).name}"
