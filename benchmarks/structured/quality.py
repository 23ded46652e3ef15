"""Pruned bases against the whole base: Light-PEFT on an encoder, LoRAPrune on a decoder.

    python -m benchmarks.structured.quality --model FOLDER --data FOLDER_OF_TASKS
    python -m benchmarks.structured.quality --decoder FOLDER --text FOLDER_OF_TEXTS

One command may do both. Start it in as many processes as there are cores; they share the work.
Stop and start it at will.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, run_all
from benchmarks.structured.methods import METHODS, Bench, gradual
from prunepeft.config import load_config
from prunepeft.engine import Engine
from prunepeft.metrics import METRICS
from prunepeft.plan import make_plan
from prunepeft.state import RunFolder

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
COMMON = ("seeds", "tuning_seed", "batch_size", "rank")
# What a result does not depend on: which others there are.
OTHERS = ("seeds", "tasks", "methods", "criteria", "levels")

Method = Callable[[Bench], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of the encoder")
    parser.add_argument("--data", help="folder with one folder per task")
    parser.add_argument("--decoder", help="folder of the decoder")
    parser.add_argument("--text", help="folder with one folder of texts per task")
    parser.add_argument("--cache", default="runs/bench-structured", help="finished trainings")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after this time")
    args = parser.parse_args()
    sources = {"encoder": (args.model, args.data), "decoder": (args.decoder, args.text)}
    blocks = [block for block, pair in sources.items() if all(pair)]
    if not blocks or any(len(set(map(bool, pair))) > 1 for pair in sources.values()):
        parser.error("give --model and --data, or --decoder and --text, or all four")
    torch.set_num_threads(1)
    results = Results(HERE / "quality")
    experiments = [
        experiment
        for block in blocks
        for experiment in make_experiments(block, sources[block], Path(args.cache), results)
    ]
    done = run_all(experiments, results, Path(args.cache) / "claims", args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


def settings_of(block: str) -> dict[str, Any]:
    """The block with what both blocks share."""
    return {k: SUITE[k] for k in COMMON} | SUITE[block]


def methods_of(settings: dict[str, Any]) -> dict[str, Method]:
    """Name in the results -> what it does."""
    found: dict[str, Method] = {name: METHODS[name] for name in settings["methods"]}
    for level, ratios in settings.get("levels", {}).items():
        for criterion in settings["criteria"]:
            name = f"{criterion}-{level}"
            found[name] = partial(gradual, criterion=criterion, ratios=ratios)
    return found


def make_experiments(
    block: str, source: tuple[str, str], cache: Path, results: Results
) -> list[Experiment]:
    """Per task: three rates of plain LoRA on the tuning seed, then every method and seed."""
    settings = settings_of(block)
    shared = {k: v for k, v in settings.items() if k not in OTHERS}
    experiments = []
    for task in settings["tasks"]:
        prepare = partial(make_bench, source, cache, settings, task)
        tuned = [name for name in ("lora_all", "lora_qv") if name in settings["methods"]]
        tuning = {m: {r: f"{task}/tune-{m}-{r:g}" for r in settings["rates"]} for m in tuned}
        for method, names in tuning.items():
            for rate, name in names.items():
                run = partial(_run, METHODS[method], prepare, settings["tuning_seed"], rate)
                experiments.append(Experiment(name, {**shared, "rate": rate}, run))
        for seed in settings["seeds"]:
            for name, method in methods_of(settings).items():
                needs = tuning.get(name, tuning["lora_all"])
                run = partial(_report, method, prepare, seed, results, needs)
                config = {**shared, "seed": seed, "method": name}
                config |= {"ratios": r} if (r := _ratios(method)) else {}
                file = f"{task}/{name}-seed{seed}"
                experiments.append(Experiment(file, config, run, tuple(needs.values())))
    return experiments


def make_bench(
    source: tuple[str, str],
    cache: Path,
    settings: dict[str, Any],
    task: str,
    seed: int,
    rate: float,
) -> Bench:
    """A fresh base model with the data of one task and seed; methods may cut it."""
    model, data = source
    flags = {
        "model": model,
        "data": str(Path(data) / task),
        "budget": "10%",  # not used: limits and placements are given
        "metric": settings["tasks"][task]["metric"],
        "precision": settings["precision"],
        "seed": seed,
        "search.lr": rate,
        "train.lr": rate,
        "train.max_rows": settings["rows"],
        "train.epochs": settings["epochs"],
        "train.batch_size": settings["batch_size"],
    }
    if "max_length" in settings:
        flags["train.max_length"] = settings["max_length"]
    folder = RunFolder(cache / f"{task}-{seed}")
    fresh = partial(Engine, make_plan(load_config(None, (), flags)), folder, is_main=True)
    also = {k: str(Path(data) / place) for k, place in settings.get("also", {}).items()}
    return Bench(fresh(), settings, seed, rate, also, fresh)


def _run(
    method: Method, prepare: Callable[[int, float], Bench], seed: int, rate: float
) -> dict[str, Any]:
    return method(prepare(seed, rate))


def _report(
    method: Method,
    prepare: Callable[[int, float], Bench],
    seed: int,
    results: Results,
    tuning: dict[float, str],
) -> dict[str, Any]:
    """One reported seed, at the best rate of the tuning seed (the smaller on a tie)."""
    found = {rate: results.get(name)["result"]["metric"] for rate, name in tuning.items()}
    bench = prepare(seed, min(found))
    sign = 1 if METRICS.get(bench.engine.plan.metric).greater_is_better else -1
    best = max(found, key=lambda rate: (sign * found[rate], -rate))
    return method(bench if best == bench.rate else prepare(seed, best))


def _ratios(method: Method) -> dict[str, float] | None:
    return method.keywords["ratios"] if isinstance(method, partial) else None


if __name__ == "__main__":
    main()
