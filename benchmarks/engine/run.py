"""Speed of single parts of the engine: step, prefix reuse, memory, padding.

    python -m benchmarks.engine.run
    python -m benchmarks.engine.run --model FOLDER --data FOLDER_OF_TASKS --only padding

Experiments are in `suite.yaml`; one JSON each in `results/`, those that are up to date are skipped.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.engine import memory, padding, prefix, step
from benchmarks.harness import Experiment, Results, run_all

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
PAIRED = {"step": step.measure, "prefix": prefix.measure}
SETTINGS = ("rows", "steps", "pairs")


def make_experiments(model: str | None, data: str | None, device: str) -> list[Experiment]:
    """All of the suite for which there is what they need."""
    found = []
    for what, measure in PAIRED.items():
        suite = SUITE[what] if device == "cpu" else SUITE[what]["cuda"]
        settings = {k: suite[k] for k in SETTINGS} | {"device": device}
        for case in suite["cases"]:
            run = partial(measure, case, **settings)
            found.append(Experiment(case_name(what, case, device), settings | case, run))
    if device != "cpu":
        return found
    shape = {k: SUITE["memory"][k] for k in ("rows", "tokens")}
    for case in SUITE["memory"]["cases"]:
        run = partial(memory.measure, **shape, **case)
        found.append(Experiment(f"memory-{case['layers']}-layers", shape | case, run))
    if model and data:
        settings = {k: v for k, v in SUITE["padding"].items() if k != "tasks"}
        for task in SUITE["padding"]["tasks"]:
            run = partial(padding.measure, model, Path(data), task, settings)
            found.append(Experiment(f"padding-{task}", settings | {"task": task}, run))
    return found


def case_name(what: str, case: dict[str, Any], device: str) -> str:
    """Name of a result file."""
    name = f"{what}-{case['layers']}-layers-{case['tokens']}-tokens-{case['precision']}"
    return name if device == "cpu" else f"{name}-{device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of the encoder whose tokenizer is used")
    parser.add_argument("--data", help="folder with one folder per task")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after this time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where files go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    experiments = make_experiments(args.model, args.data, args.device)
    chosen = [e for e in experiments if not args.only or e.name.startswith(tuple(args.only))]
    claims = Path("runs/bench-engine/claims")
    done = run_all(chosen, Results(args.results), claims, args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


if __name__ == "__main__":
    main()
