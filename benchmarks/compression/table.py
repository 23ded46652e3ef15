"""The tables of compressed adapters for `docs/benchmarks.md`."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import gap, result, section, spread, table

HERE = Path(__file__).parent
HEADS = ("codec", "density", "encode, M/s", "decode, M/s", "packbits, M/s", "bits", "of formula")


def compression_tables() -> list[str]:
    """Both sections, what is there of them."""
    return [*_codecs(), *_quality(), *_merged()]


def _codecs() -> list[str]:
    file = HERE / "results" / "codecs.json"
    if not file.is_file():
        return []
    result = json.loads(file.read_text("utf-8"))
    heads = (*HEADS, "memory")
    lines = [
        "",
        (HERE / "about.md").read_text("utf-8").rstrip(),
        "",
        f"### {result['params'] / 1e6:g} million parameters, cpu",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for r in result["rows"]:
        speeds = " | ".join(f"{r[key]:,.0f}" for key in ("encode", "decode", "packbits"))
        lines.append(
            f"| {r['codec']} | {r['density']:g} | {speeds} | {r['bits_per_param']:.3f} "
            f"| {r['over_formula']:.1%} | {r['memory']:.2f} |"
        )
    return [*lines, ""]


def _quality() -> list[str]:
    suite = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
    trained = yaml.safe_load((HERE.parent / "sparse_tuning" / "suite.yaml").read_text("utf-8"))
    heads = ("density", "metric", "difference", "alpha", "alpha = 1", "smaller", "seeds")
    lines: list[str] = []
    for block in ("encoder", "decoder"):
        for task, settings in trained[block]["tasks"].items():
            rows = [
                row
                for density in suite["densities"]
                if (row := _density(task, density, trained["seeds"]))
            ]
            if rows:
                before = _results(task, suite["densities"][0], trained["seeds"])
                whole = ("1, as trained", spread([r["before"] for r in before.values()]))
                lines += [f"### {task}, compressed: {settings['metric']}", ""]
                lines += table(heads, [(*whole, *["-"] * 4, len(before)), *rows])
    return [*section(HERE / "quality.md"), *lines] if lines else []


def _results(task: str, density: float, seeds: list[int]) -> dict[int, dict[str, Any]]:
    folder = HERE / "quality" / task
    found = {seed: result(folder / f"density-{density:g}-seed{seed}.json") for seed in seeds}
    return {seed: r for seed, r in found.items() if r}


def _density(task: str, density: float, seeds: list[int]) -> tuple[Any, ...] | None:
    found = _results(task, density, seeds)
    if not found:
        return None
    values = {seed: r["metric"] for seed, r in found.items()}
    return (
        f"{density:g}",
        spread(list(values.values())),
        gap(values, {seed: r["before"] for seed, r in found.items()}),
        ", ".join(f"{r['alpha']:g}" for r in found.values()),
        spread([r["alpha_1"] for r in found.values()]),
        f"{statistics.mean(16 / r['bits_per_param'] for r in found.values()):.1f}",
        len(found),
    )


def _merged() -> list[str]:
    suite = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))["merge"]
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((HERE / "quality" / "merged").glob("*.json")):
        found.setdefault(file.stem.rpartition("-seed")[0], []).append(result(file))
    if not found:
        return []
    first = next(iter(found.values()))
    rows = [
        (part, *(spread([r[part][t] for r in first]) for t in suite["tasks"]), "-", "-", len(first))
        for part in ("alone", "heads")
    ]
    for name, results in sorted(found.items()):
        means = [statistics.mean(r["merged"].values()) for r in results]
        tasks = [spread([r["merged"][t] for r in results]) for t in suite["tasks"]]
        scales = ", ".join(f"{r['scale']:g}" for r in results)
        rows.append((name.replace("-", ", "), *tasks, spread(means), scales, len(results)))
    words = {k: ", ".join(map(str, suite[k])) for k in ("tasks", "scales")}
    about = section(HERE / "merged.md", **words, density=suite["density"])[1:]
    return [*about, *table(("merge", *suite["tasks"], "mean", "scale", "seeds"), rows)]
