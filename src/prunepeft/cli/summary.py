"""The closing words of a search or training: what came out, against what, and where it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunepeft.cli.output import Output
from prunepeft.progress import short_time

HEADER = ("", "metric", "trainable parameters", "modules", "training", "steps")


def print_result(result: Mapping[str, Any], run: Path, output: Output) -> None:
    """Print the table of a run and its baselines, and where to look next."""
    metric, budget, placement = result["metric"], result["budget"], result["placement"]
    own = {
        "name": result["method"],
        "metric": metric,
        "n_params": placement["n_params"],
        "n_modules": placement["n_modules"],
        **result["train"],
    }
    rows = [
        (
            entry["name"],
            f"{entry['metric']['value']:.4f}",
            entry["n_params"],
            entry.get("n_modules"),
            short_time(entry["seconds"]),
            entry["steps"],
        )
        for entry in (own, *result["baselines"])
    ]
    output.table(f"validation {metric['name']}", HEADER, rows)
    if budget["text"]:
        used = f"{budget['realised']:,} of {budget['limit']:,} {budget['unit']}"
        output.line(f"budget   {budget['text']}: {used}")
    if result["search"]["runs"]:
        search = result["search"]
        output.line(f"search   {short_time(search['seconds'])}, {search['steps']:,} steps")
    output.line(f"adapter  {run / 'best' / 'adapter'}")
    output.line(f"report   {run / 'report' / 'report.html'}")
    output.line(f"next     prunepeft export {run} --format peft")
