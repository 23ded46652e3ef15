"""The tables of sparse tuning for docs/benchmarks.md."""

import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import gap, quartiles, read, result, section, spread, table

HERE = Path(__file__).parent
HEADS = ("method", "metric", "difference", "time", "parameters", "learning rate", "seeds")


def sparse_tables(here: Path = HERE) -> list[str]:
    """The section, empty without results."""
    suite = yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    lines: list[str] = []
    for block in ("encoder", "decoder"):
        for task, settings in suite[block]["tasks"].items():
            lines += _quality(here / "quality" / task, task, settings["metric"], suite)
    for file in sorted((here / "results").glob("cost-*.json")):
        lines += _cost(here, read(file))
    return [*section(here / "about.md"), *lines] if lines else []


def _quality(folder: Path, task: str, metric: str, suite: dict[str, Any]) -> list[str]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for method in suite["methods"]:
        files = {seed: result(folder / f"{method}-seed{seed}.json") for seed in suite["seeds"]}
        found[method] = {seed: r for seed, r in files.items() if r}
    base = found["lora"]
    if not base:
        return []
    rows = []
    for method, by_seed in found.items():
        if not by_seed:
            continue
        values = {seed: r["metric"] for seed, r in by_seed.items()}
        times = [
            r["processor_seconds"] / base[seed]["processor_seconds"]
            for seed, r in by_seed.items()
            if seed in base
        ]
        one = next(iter(by_seed.values()))
        rows.append(
            (
                method,
                spread(list(values.values())),
                "-" if method == "lora" else gap(values, {s: r["metric"] for s, r in base.items()}),
                f"{statistics.mean(times):.2f}" if times else "-",
                f"{one['n_params']:,}",
                f"{one['lr']:g}",
                len(by_seed),
            )
        )
    return [f"### {task}: {metric}", "", *table(HEADS, rows)]


def _cost(here: Path, found: dict[str, Any]) -> list[str]:
    variants = found["variants"]
    base = variants["all"]["memory"]
    rows = []
    for name, r in variants.items():
        memory = r["memory"]
        beyond = [m["peak"] - m["weights"] for m in (memory, base)]
        rows.append(
            (
                name,
                f"{r['ratio']:.2f}",
                quartiles(r["ratio_quartiles"]),
                f"{beyond[0] / 2**20:,.0f} MiB",
                f"{beyond[0] / beyond[1]:.2f}",
                f"{memory['gradients'] / base['gradients']:.2f}",
                f"{memory['moments'] / base['moments']:.2f}",
            )
        )
    heads = ("training", "time", "quartiles", "memory", "of all", "gradients", "moments")
    words = {k: v for k, v in found.items() if not isinstance(v, dict)}
    return [*section(here / "cost.md", **words)[1:], *table(heads, rows)]
