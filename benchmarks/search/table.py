"""The tables of searches for docs/benchmarks.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from scipy.stats import friedmanchisquare, rankdata

from benchmarks.search.run import TUNED, cell_name, methods_of
from prunepeft.compare import Cell, make_comparison
from prunepeft.metrics import METRICS

HERE = Path(__file__).parent
TITLES = {"own": "own cost", "equal": "equal compute"}


def search_tables(here: Path = HERE) -> list[str]:
    """The section, empty without results."""
    suite = yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    lines: list[str] = []
    every: dict[str, list[dict[str, Any]]] = {}
    for task, settings in suite["tasks"].items():
        every[task] = found = _read(here / "results", task, suite)
        cells = [Cell.from_dict(result) for result in found]
        if not any(cell.metric is not None for cell in cells):
            continue
        better = METRICS.get(settings["metric"]).greater_is_better
        compared = make_comparison(cells, suite["reference"], greater_is_better=better)
        for cost, table in compared["tables"].items():
            work = _work(found, cost) if cost == "own" else None
            title = f"### {task}, {TITLES[cost]}: {settings['metric']}"
            lines += [title, "", *_table(table, work), ""]
        known = next(r for r in found if r["metric"] is not None)
        lines += [
            f"Learning rate {known['lr']:g}. {known['n_train']:,} training and "
            f"{known['n_validation']:,} validation rows. Limit: {known['limit']:,} parameters.",
            "",
            *(f"- {line}" for line in compared["takeaways"]),
            "",
        ]
    words = suite | {k: ", ".join(f"{v:g}" for v in suite[k]) for k in ("rates", "seeds")}
    rows = (f"{settings['rows']:,} ({task})" for task, settings in suite["tasks"].items())
    words["rows"] = ", ".join(rows)
    about = (here / "about.md").read_text("utf-8").format(**words).rstrip()
    return ["", about, "", *_ranks(every, suite), *lines] if lines else []


def _ranks(every: dict[str, list[dict[str, Any]]], suite: dict[str, Any]) -> list[str]:
    """Mean rank of each method over all tasks and seeds in which every method has a result."""
    columns: dict[str, dict[str, float]] = {}
    notes = []
    for cost, title in TITLES.items():
        methods = methods_of(suite, cost)
        blocks = _blocks(every, suite, cost, methods)
        if len(blocks) < 2:
            return []
        ranks = [rankdata([-value for value in block]) for block in blocks]
        columns[title] = {m: fmean(r[i] for r in ranks) for i, m in enumerate(methods)}
        p = friedmanchisquare(*zip(*blocks, strict=True)).pvalue
        notes.append(f"{title}: {len(methods)} methods, {len(blocks)} pairs, p = {p:.2g}")
    works = [_work(found, "own") for found in every.values()]
    own = columns[TITLES["own"]]
    rows = [
        f"| {method} "
        + "".join(f"| {c[method]:.1f} " if method in c else "| - " for c in columns.values())
        + f"| {fmean(float(w[method]) for w in works):.2f} |"
        for method in sorted(own, key=own.__getitem__)
    ]
    return [
        "### All tasks: mean rank",
        "",
        "1 is the best, over pairs of task and seed; the work is that at own cost.",
        "",
        f"| method | {' | '.join(columns)} | work |",
        "|---|" + "---|" * (len(columns) + 1),
        *rows,
        "",
        f"Friedman's test, whether methods differ at all: {'; '.join(notes)}.",
        "",
    ]


def _blocks(
    every: dict[str, list[dict[str, Any]]], suite: dict[str, Any], cost: str, methods: Sequence[str]
) -> list[list[float]]:
    """Metrics of all methods, better when larger, for each task and seed that has them all."""
    blocks = []
    for task, found in every.items():
        sign = 1 if METRICS.get(suite["tasks"][task]["metric"]).greater_is_better else -1
        for seed in suite["seeds"]:
            here = [r for r in found if (r["cost"], r["seed"]) == (cost, seed)]
            values = {r["method"]: sign * r["metric"] for r in here if r["metric"] is not None}
            if all(method in values for method in methods):
                blocks.append([values[method] for method in methods])
    return blocks


def _read(folder: Path, task: str, suite: dict[str, Any]) -> list[dict[str, Any]]:
    names = [
        cell_name(task, cost, method, seed)
        for cost in TITLES
        for method in methods_of(suite)
        for seed in suite["seeds"]
    ]
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(f.read_text("utf-8"))["result"] for f in files if f.is_file()]


def _work(found: list[dict[str, Any]], cost: str) -> dict[str, str]:
    """Processor time of each method over that of plain LoRA with the same seed, mean."""
    spent = {(r["method"], r["seed"]): r for r in found if r["cost"] == cost}
    ratios: dict[str, list[float]] = {}
    for (method, seed), result in spent.items():
        plain = spent.get((TUNED, seed), {}).get("processor_seconds")
        if result["metric"] is not None and plain:
            ratios.setdefault(method, []).append(result["processor_seconds"] / plain)
    return {method: f"{fmean(values):.2f}" for method, values in ratios.items()}


def _table(table: dict[str, Any], work: dict[str, str] | None) -> list[str]:
    heads = ["method", "metric", "difference", "95% interval", "verdict", "steps"]
    heads += ["search, seconds", "retraining, seconds", "of allowance", "parameters", "seeds"]
    if work is not None:
        heads[8] = "work"
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(_row(row, work) for row in table["rows"]),
    ]


def _row(row: dict[str, Any], work: dict[str, str] | None) -> str:
    metric, gap = row["metric"], row["difference"] or {}
    if not metric["n"]:
        return f"| {row['method']} |" + " - |" * 3 + f" {row['failed']} runs failed |" + " - |" * 6
    spread = "" if metric["std"] is None else f" ± {metric['std']:.4f}"
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    cells = (
        row["method"],
        f"{metric['mean']:.4f}{spread}",
        "-" if gap.get("mean") is None else f"{gap['mean']:+.4f}",
        "-" if gap.get("low") is None else f"{gap['low']:+.4f} to {gap['high']:+.4f}",
        row["verdict"],
        f"{row['search_steps']:,.0f} + {row['train_steps']:,.0f}",
        f"{row['search_seconds']:.0f}",
        f"{row['train_seconds']:.0f}",
        ratio if work is None else work.get(row["method"], "-"),
        f"{row['parameters']:,.0f}",
        str(metric["n"]) + (f" ({row['failed']} failed)" if row["failed"] else ""),
    )
    return f"| {' | '.join(cells)} |"
