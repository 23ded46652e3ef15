"""Render `docs/benchmarks.md` from the result files: `python -m benchmarks.render`."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks.compression.table import compression_tables
from benchmarks.engine.table import engine_tables
from benchmarks.gpu.table import gpu_tables
from benchmarks.scaling.table import scaling_tables
from benchmarks.search.table import search_tables
from benchmarks.search_cost.table import search_cost_tables
from benchmarks.sparse_tuning.table import sparse_tables

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "benchmarks.md"
NAMES = {
    "lora_qv": "plain LoRA, query and value",
    "lora_all": "plain LoRA, all linear layers",
    "serial": "serial adapter after every feed-forward",
    "union": "union, not pruned (over budget)",
    "random": "random pruning",
    "single": "best single criterion",
    "prunepeft": "PrunePEFT",
    "prunepeft_low": "PrunePEFT, low fidelity",
}


def main() -> None:
    TARGET.write_text(render(), "utf-8")


def render() -> str:
    """The whole page."""
    parts = [(HERE / "about.md").read_text("utf-8"), *_first(), *search_cost_tables()]
    parts += [*search_tables(), *engine_tables(), *scaling_tables(), *gpu_tables()]
    parts += [*_kinds(), *_alone(), *_structured(), *_structured_quality()]
    parts += [*sparse_tables(), *compression_tables()]
    return "\n".join(parts).rstrip() + "\n"


def _first() -> list[str]:
    suite = yaml.safe_load((HERE / "first" / "suite.yaml").read_text("utf-8"))
    words = {k: ", ".join(f"{v:g}" for v in suite[k]) for k in ("rates", "seeds")}
    words["rows"] = ", ".join(f"{t['rows']:,} ({name})" for name, t in suite["tasks"].items())
    lines = [(HERE / "first" / "about.md").read_text("utf-8").format(**{**suite, **words})]
    for task, settings in suite["tasks"].items():
        lines += _first_task(task, settings["metric"], suite)
    return lines


def _first_task(task: str, metric: str, suite: dict[str, Any]) -> list[str]:
    found: dict[str, list[dict[str, Any]]] = {}
    for method in suite["methods"]:
        files = [_path(task, method, seed) for seed in suite["seeds"]]
        found[method] = [_read(f)["result"] for f in files if f.is_file()]
    if not any(found.values()):
        return []
    whole = {m for m, rows in found.items() if len(rows) == len(suite["seeds"])}
    plain = [m for m in ("lora_qv", "lora_all") if m in whole]
    best = max(plain, key=lambda m: _mean(found[m], "metric"), default=None)
    lines = [
        f"### {task}: {metric}",
        "",
        "| method | metric | difference | parameters | search cost (seconds, steps) | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in found.items():
        if not rows:
            continue
        gap = "-"
        if best in found and method in whole and method != best:
            gaps = [r["metric"] - b["metric"] for r, b in zip(rows, found[best], strict=True)]
            gap = f"{statistics.mean(gaps):+.4f} ± {_std(gaps):.4f}"
        cost = "-"
        if "search_seconds" in rows[0]:
            seconds = statistics.mean(r["search_seconds"] / r["train_seconds"] for r in rows)
            steps = statistics.mean(r["search_steps"] / r["train_steps"] for r in rows)
            cost = f"{seconds:.2f}, {steps:.2f}"
        values = [r["metric"] for r in rows]
        name = NAMES[method]
        if method == "single":
            name += f" ({rows[0]['criterion']})"
        cells = (
            name,
            f"{statistics.mean(values):.4f} ± {_std(values):.4f}",
            gap,
            f"{_mean(rows, 'n_params'):,.0f}",
            cost,
            len(rows),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    rates = {m: found[m][0]["lr"] for m in plain}
    rows = next(r for r in found.values() if r)
    lines += [
        "",
        f"Learning rates: {', '.join(f'{NAMES[m]} {r:g}' for m, r in rates.items())}. "
        f"{rows[0]['n_validation']:,} validation rows. Limit: {rows[0]['limit']:,} parameters.",
        "",
    ]
    return lines


def _kinds() -> list[str]:
    results = [_read(f) for f in sorted((HERE / "kinds" / "results").glob("*.json"))]
    if not results:
        return []
    lines = ["", (HERE / "kinds" / "about.md").read_text("utf-8").rstrip(), ""]
    for shape, device in sorted({(r["shape"], r["device"]) for r in results}):
        rows = [r for r in results if (r["shape"], r["device"]) == (shape, device)]
        lines += [
            f"### {shape}, {rows[0]['rows']} x {rows[0]['tokens']} tokens, {device}",
            "",
            "| kind | time | quartiles | operations | over prediction |",
            "|---|---|---|---|---|",
        ]
        for r in sorted(rows, key=lambda r: r["time_ratio"]):
            low, _, high = r["time_quartiles"]
            time, operations = r["time_ratio"], r["operations_ratio"]
            lines.append(
                f"| {r['kind']} | {time:.3f} | {low:.3f} to {high:.3f} | {operations:.3f} "
                f"| {time / operations:.2f} |"
            )
        lines.append("")
    return lines


def _alone() -> list[str]:
    suite = yaml.safe_load((HERE / "kinds" / "suite.yaml").read_text("utf-8"))
    images = suite | suite["images"]
    lines = _alone_tables(suite) + _alone_tables(images)
    words = {"rows": suite["rows"], "image_precision": images["precision"]}
    about = (HERE / "kinds" / "quality.md").read_text("utf-8").format(**words)
    return ["", about.rstrip(), "", *lines] if lines else []


def _alone_tables(suite: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for task, settings in suite["tasks"].items():
        folder = HERE / "kinds" / "quality" / task
        rows = []
        for kind in suite["kinds"]:
            files = [folder / f"{kind}-seed{seed}.json" for seed in suite["seeds"]]
            if found := [_read(f)["result"] for f in files if f.is_file()]:
                values = [r["metric"] for r in found]
                rows.append(
                    f"| {kind} | {statistics.mean(values):.4f} ± {_std(values):.4f} "
                    f"| {found[0]['n_params']:,} | {_mean(found, 'train_seconds'):.0f} "
                    f"| {found[0]['lr']:g} | {len(found)} |"
                )
        if (file := folder / "untouched.json").is_file():
            rows.insert(0, f"| untouched | {_read(file)['result']['metric']:.4f} | 0 | - | - | - |")
        if rows:
            lines += [
                f"### {settings.get('title', task)}: {settings['metric']}",
                "",
                "| kind | metric | parameters | training, seconds | learning rate | seeds |",
                "|---|---|---|---|---|---|",
                *rows,
                "",
            ]
    return lines


def _structured() -> list[str]:
    results = [_read(f) for f in sorted((HERE / "structured" / "results").glob("*.json"))]
    if not results:
        return []
    lines = ["", (HERE / "structured" / "about.md").read_text("utf-8").rstrip(), ""]
    for shape, device in sorted({(r["shape"], r["device"]) for r in results}):
        rows = [r for r in results if (r["shape"], r["device"]) == (shape, device)]
        first = rows[0]
        lines += [
            f"### {shape}, {first['layers']} layers, {first['rows']} x {first['tokens']} tokens, "
            f"{first['dtype']}, {device}",
            "",
            "| left | step | speed-up | quartiles | predicted | of it | memory | predicted |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in sorted(rows, key=lambda r: -r["base_params"][r["variant"]]):
            lines += [_structured_row(r, step) for step in ("train", "infer")]
        lines.append("")
    return lines


def _structured_row(r: dict[str, Any], step: str) -> str:
    before, left = r["units"]["dense"], r["units"][r["variant"]]
    time, memory = r[step], r["memory"][step]
    low, _, high = time["speedup_quartiles"]
    cells = (
        ", ".join(f"{left[what]} of {n} {what}" for what, n in before.items()),
        {"train": "training", "infer": "inference"}[step],
        f"{time['speedup']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{time['predicted']:.2f}",
        f"{time['reached']:.0%}",
        f"{memory['ratio']:.2f}",
        f"{memory['predicted']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _structured_quality() -> list[str]:
    here = HERE / "structured"
    suite = yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    lines: list[str] = []
    for block in (suite["encoder"], suite["decoder"]):
        levels = [f"{c}-{level}" for level in block.get("levels", ()) for c in block["criteria"]]
        for task, settings in block["tasks"].items():
            methods = (*block["methods"], *levels)
            found = {m: _quality_results(task, m, suite["seeds"]) for m in methods}
            results = [r for by_seed in found.values() for r in by_seed.values()]
            also = list(dict.fromkeys(name for r in results for name in r.get("also", ())))
            dense = found["lora_all"]
            rows = [_quality_row(m, rs, dense, also) for m, rs in found.items() if rs]
            if rows:
                heads = ("method", "metric", "difference", *also, "base left", "trainable")
                heads += ("training, seconds", "learning rate", "seeds")
                lines += [
                    f"### {task}: {settings['metric']}",
                    "",
                    f"| {' | '.join(heads)} |",
                    "|" + "---|" * len(heads),
                    *rows,
                    "",
                ]
    about = (here / "quality.md").read_text("utf-8").rstrip()
    return ["", about, "", *lines] if lines else []


def _quality_results(task: str, method: str, seeds: list[int]) -> dict[int, dict[str, Any]]:
    """Seed -> result."""
    folder = HERE / "structured" / "quality" / task
    files = {s: folder / f"{method}-seed{s}.json" for s in seeds}
    return {s: _read(f)["result"] for s, f in files.items() if f.is_file()}


def _quality_row(
    method: str,
    by_seed: dict[int, dict[str, Any]],
    dense: dict[int, dict[str, Any]],
    also: list[str],
) -> str:
    found = list(by_seed.values())
    values = [r["metric"] for r in found]
    gaps = [by_seed[s]["metric"] - dense[s]["metric"] for s in by_seed.keys() & dense.keys()]
    is_own = by_seed == dense or not gaps
    others = [[r["also"][name] for r in found if name in r.get("also", ())] for name in also]
    seconds = [r.get("search_seconds", 0) + r.get("train_seconds", 0) for r in found]
    cells = (
        method,
        f"{statistics.mean(values):.4f} ± {_std(values):.4f}",
        "-" if is_own else f"{statistics.mean(gaps):+.4f} ± {_std(gaps):.4f}",
        *(f"{statistics.mean(o):.4g} ± {_std(o):.2g}" if o else "-" for o in others),
        f"{_mean(found, 'base_params') / _mean(found, 'base_params_before'):.0%}",
        f"{statistics.mean(r.get('n_params', 0) for r in found):,.0f}",
        f"{statistics.mean(seconds):.0f}",
        f"{found[0]['lr']:g}" if any(seconds) else "-",
        str(len(found)),
    )
    return f"| {' | '.join(cells)} |"


def _path(task: str, method: str, seed: int) -> Path:
    return HERE / "first" / "results" / task / f"{method}-seed{seed}.json"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(r[key] for r in rows)


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
