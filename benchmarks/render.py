"""Render `docs/benchmarks.md` from the result files: `python -m benchmarks.render`."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

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
    parts = [(HERE / "about.md").read_text("utf-8"), *_first(), *_recorder(), *_kinds(), *_alone()]
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


def _recorder() -> list[str]:
    files = sorted((HERE / "engine" / "results").glob("recorder-*.json"))
    rows = []
    for result in map(_read, files):
        low, _, high = result["ratio_quartiles"]
        cells = (
            result["machine"]["threads"],
            result["pairs"] * result["steps_per_pair"],
            f"{result['ratio_median']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{result['ratio_of_sums']:.3f}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    about = (HERE / "engine" / "about.md").read_text("utf-8").rstrip()
    return [about, *rows] if rows else []


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
    lines: list[str] = []
    for task, settings in suite["tasks"].items():
        rows = []
        for kind in suite["kinds"]:
            files = [HERE / f"kinds/quality/{task}/{kind}-seed{s}.json" for s in suite["seeds"]]
            if found := [_read(f)["result"] for f in files if f.is_file()]:
                values = [r["metric"] for r in found]
                rows.append(
                    f"| {kind} | {statistics.mean(values):.4f} ± {_std(values):.4f} "
                    f"| {found[0]['n_params']:,} | {_mean(found, 'train_seconds'):.0f} "
                    f"| {found[0]['lr']:g} | {len(found)} |"
                )
        if rows:
            lines += [
                f"### {task}: {settings['metric']}",
                "",
                "| kind | metric | parameters | training, seconds | learning rate | seeds |",
                "|---|---|---|---|---|---|",
                *rows,
                "",
            ]
    about = (HERE / "kinds" / "quality.md").read_text("utf-8").format(rows=suite["rows"])
    return ["", about.rstrip(), "", *lines] if lines else []


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
