"""The tables of a comparison, from the content of its compare.json."""

from collections.abc import Mapping
from typing import Any

from prunepeft.report.render import Column, Table

COST_WORDS = {"own": "own cost", "equal": "equal compute"}


def comparison_tables(comparison: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Cost -> its tables: what each method reached, and what it took."""
    metric = comparison["metric"]
    return {
        cost: [
            result_table(table["rows"], metric, comparison["reference"], cost),
            cost_table(table["rows"], cost),
        ]
        for cost, table in comparison["tables"].items()
    }


def result_table(rows: list[dict[str, Any]], metric: str, reference: str, cost: str) -> Table:
    """Quality and difference to the reference."""
    columns = (
        Column("method"),
        Column(metric, "score"),
        Column("std", "score"),
        Column("seeds", "int"),
        Column("difference", "score"),
        Column("95% low", "score"),
        Column("95% high", "score"),
        Column("p", "significant"),
        Column("p, Holm", "significant"),
        Column("p, Wilcoxon", "significant"),
        Column("verdict"),
        Column("parameters", "int"),
    )
    found = []
    for row in rows:
        gap = row["difference"] or {}
        names = ("mean", "low", "high", "p", "p_holm", "p_wilcoxon")
        verdict = row["verdict"] + (f" ({gap['note']})" if gap.get("note") else "")
        found.append(
            (
                row["method"],
                row["metric"]["mean"],
                row["metric"]["std"],
                row["metric"]["n"],
                *(gap.get(name) for name in names),
                verdict if row["metric"]["n"] else f"{row['failed']} runs failed",
                row["parameters"],
            )
        )
    note = (
        f"Difference to {reference}, paired by seed, with the 95 % interval of Student's t; an "
        "interval is of one method alone, Holm's p accounts for all. The verdict goes by Holm's p "
        "under 0.05."
    )
    title = f"Quality at {COST_WORDS[cost]}"
    return Table(f"quality-{cost}", title, columns, tuple(found), note)


def cost_table(rows: list[dict[str, Any]], cost: str) -> Table:
    """Steps and seconds of search and retraining, means over the seeds."""
    forms = {
        "method": ("method", "text"),
        "search_steps": ("search steps", "int"),
        "train_steps": ("retraining steps", "int"),
        "steps": ("all steps", "int"),
        "ratio": ("of allowance", "ratio"),
        "search_seconds": ("search", "seconds"),
        "train_seconds": ("retraining", "seconds"),
        "epochs": ("epochs", "plain"),
        "n_modules": ("modules", "plain"),
        "peak_memory_bytes": ("peak memory", "bytes"),
    }
    columns = [Column(*form) for form in forms.values()]
    if cost == "own":
        columns = [c for c in columns if c.name != "of allowance"]
    found = [
        (*(row[k] for k in forms if cost != "own" or k != "ratio"), "; ".join(row["notes"]))
        for row in rows
    ]
    note = "Means over the seeds. One step is one batch of the same size in every column."
    title = f"What it took at {COST_WORDS[cost]}"
    return Table(f"took-{cost}", title, (*columns, Column("changed")), tuple(found), note)


def cells_table(comparison: Mapping[str, Any]) -> Table:
    """Every run."""
    forms = {"method": "text", "cost": "text", "seed": "int", "metric": "score"}
    forms |= {"steps": "int", "search_seconds": "seconds", "train_seconds": "seconds"}
    forms |= {"n_params": "int", "note": "text", "error": "text", "run": "text"}
    rows = tuple(tuple(cell[k] for k in forms) for cell in comparison["cells"])
    columns = tuple(Column(k.replace("_", " "), form) for k, form in forms.items())
    return Table("runs", "Every run", columns, rows)
