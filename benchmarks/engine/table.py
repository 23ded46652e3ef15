"""The tables of the engine for docs/benchmarks.md."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import quartiles, read, section, table

HERE = Path(__file__).parent


def engine_tables(here: Path = HERE) -> list[str]:
    """What is there of the sections."""
    folder, suite = here / "results", yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    return [
        *_recorder(here, folder),
        *_step(here, folder, suite["step"]),
        *_prefix(here, folder),
        *_padding(here, folder, suite["padding"]),
        *_memory(here, folder),
    ]


def _recorder(here: Path, folder: Path) -> list[str]:
    rows = [
        (
            r["machine"]["threads"],
            r["pairs"] * r["steps_per_pair"],
            f"{r['ratio_median']:.3f}",
            quartiles(r["ratio_quartiles"]),
            f"{r['ratio_of_sums']:.3f}",
        )
        for r in map(read, sorted(folder.glob("recorder-*.json")))
    ]
    heads = ("threads", "steps each", "ratio, median", "quartiles", "ratio of sums")
    return [*section(here / "about.md"), *table(heads, rows)] if rows else []


def _step(here: Path, folder: Path, suite: dict[str, Any]) -> list[str]:
    rows = []
    for found in map(read, sorted(folder.glob("step-*.json"))):
        config, r = found["config"], found["result"]
        ratios = r["ratios"]
        rows.append(
            (
                f"{config['layers']} layers, {config['rows']} x {config['tokens']}, "
                f"{config['precision']}, {config['device']}",
                f"{1000 * r['seconds']['peft']:.0f} ms",
                *(
                    f"{ratios[k]['median']:.3f}"
                    for k in ("union/peft", "phase/union", "phase/peft")
                ),
                quartiles(ratios["phase/peft"]["quartiles"]),
            )
        )
    heads = ("model", "peft", "our modules", "the Trainer", "in all", "quartiles")
    return [*section(here / "step.md", **suite), *table(heads, rows)] if rows else []


def _prefix(here: Path, folder: Path) -> list[str]:
    lines: list[str] = []
    for found in map(read, sorted(folder.glob("prefix-*.json"))):
        config = found["config"]
        rows = [
            (
                lowest,
                f"{1000 * r['seconds']['upper']:.0f} ms",
                f"{r['speedup']:.2f}",
                quartiles(r["speedup_quartiles"]),
                f"{r['predicted']:.2f}",
                f"{r['reached']:.0%}",
            )
            for lowest, r in found["result"]["lowest"].items()
        ]
        lines += [
            f"### {config['layers']} layers, {config['rows']} x {config['tokens']} tokens, "
            f"{config['precision']}, {config['device']}",
            "",
            *table(("L", "step", "speed-up", "quartiles", "predicted", "of it"), rows),
        ]
    return [*section(here / "prefix.md"), *lines] if lines else []


def _padding(here: Path, folder: Path, suite: dict[str, Any]) -> list[str]:
    rows = []
    for task in suite["tasks"]:
        if not (file := folder / f"padding-{task}.json").is_file():
            continue
        r = read(file)["result"]
        shares = (f"{r[k]:.1%}" for k in ("ours", "random", "fixed", "evaluation"))
        rows.append((task, f"{r['rows']:,}", f"{r['mean_length']:.0f}", *shares))
    words = {k: suite[k] for k in ("batch", "max_length")} | {"seeds": len(suite["seeds"])}
    heads = ("task", "rows", "mean tokens", "ours", "random", "fixed", "evaluation")
    return [*section(here / "padding.md", **words), *table(heads, rows)] if rows else []


def _memory(here: Path, folder: Path) -> list[str]:
    rows = []
    for found in map(read, sorted(folder.glob("memory-*.json"))):
        r = found["result"]
        peaks = (f"{r[k]['peak'] / 2**20:,.0f} MiB" for k in ("peft", "supernet"))
        rows.append((f"{found['config']['layers']} layers", *peaks, f"{r['ratio']:.2f}"))
    heads = ("model", "plain LoRA", "supernet", "ratio")
    return [*section(here / "memory.md"), *table(heads, rows)] if rows else []
