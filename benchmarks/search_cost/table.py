"""The tables of the search's cost for docs/benchmarks.md."""

import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import gap, result, section, spread, table

HERE = Path(__file__).parent
HEADS = (
    "method",
    "metric",
    "difference",
    "time",
    "search, of it",
    "steps",
    "lowest layer",
    "seeds",
)


def search_cost_tables(here: Path = HERE) -> list[str]:
    """The section, empty without results."""
    suite = yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    methods = ("peft", "lora-all", *suite["methods"])
    lines: list[str] = []
    for task, settings in suite["tasks"].items():
        folder = here / "results" / task
        cells = {m: _results(folder, m, suite["seeds"]) for m in methods}
        if cells["peft"]:
            rows = [_row(m, found, cells["peft"]) for m, found in cells.items() if found]
            rate = next(iter(cells["peft"].values()))["lr"]
            lines += [f"### {task}: {settings['metric']}, learning rate {rate:g}", ""]
            lines += table(HEADS, rows)
    references = [r for task in suite["tasks"] if (r := _reference(here / "results" / task, suite))]
    if references:
        heads = ("task", "recipe, seconds", "steps", "ours, seconds", "steps", "ratio")
        lines += [*section(here / "reference.md", **suite["reference"])[1:]]
        lines += table(heads, references)
    words = {k: ", ".join(f"{v:g}" for v in suite[k]) for k in ("rates",)}
    sizes = (f"{t['rows']:,} ({name})" for name, t in suite["tasks"].items())
    about = section(here / "about.md", **{**suite, **words, "rows": ", ".join(sizes)})
    return [*about, *lines] if lines else []


def _results(folder: Path, method: str, seeds: list[int]) -> dict[int, dict[str, Any]]:
    found = {seed: result(folder / f"{method}-seed{seed}.json") for seed in seeds}
    return {seed: r for seed, r in found.items() if r}


def _row(
    method: str, found: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]
) -> tuple[Any, ...]:
    both = sorted(found.keys() & base.keys())
    ratios = [found[s]["seconds"] / base[s]["seconds"] for s in both]
    values = {s: r["metric"] for s, r in found.items()}
    searches = [r.get("search_seconds", 0.0) / r["seconds"] for r in found.values()]
    steps = [
        (r.get("search_steps", 0), r["train_steps"])
        for r in found.values()
        if "lr" in r and "train_steps" in r
    ]
    return (
        method,
        spread(list(values.values())),
        "-" if method == "peft" else gap(values, {s: r["metric"] for s, r in base.items()}),
        spread(ratios, 2) if method != "peft" else f"1 ({_seconds(base):.0f} s)",
        f"{statistics.mean(searches):.0%}" if any(searches) else "-",
        " + ".join(f"{statistics.mean(s):,.0f}" for s in zip(*steps, strict=True)) or "-",
        ", ".join(str(r["lowest_layer"]) for r in found.values() if "lowest_layer" in r) or "-",
        len(found),
    )


def _seconds(found: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(r["seconds"] for r in found.values())


def _reference(folder: Path, suite: dict[str, Any]) -> tuple[Any, ...] | None:
    theirs = result(folder / "reference.json")
    ours = result(folder / f"prunepeft-seed{suite['seeds'][0]}.json")
    if not theirs or not ours:
        return None
    return (
        folder.name,
        f"{theirs['seconds']:,.0f}",
        f"{theirs['steps']:,}",
        f"{ours['search_seconds']:,.0f}",
        f"{ours['search_steps']:,}",
        f"{ours['search_seconds'] / theirs['seconds']:.3f}",
    )
