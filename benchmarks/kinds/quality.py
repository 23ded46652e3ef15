"""Every kind alone on small real tasks: metric, parameters, time.

    python -m benchmarks.kinds.quality --model FOLDER --data FOLDER_OF_TASKS

Start it in as many processes as there are cores; they share the work. Stop and start it at will.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, run_all
from prunepeft.candidates import make_space
from prunepeft.config import load_config
from prunepeft.engine import Engine
from prunepeft.plan import make_plan
from prunepeft.state import RunFolder

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--cache", default="runs/bench-kinds", help="finished trainings, reused")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "quality")
    experiments = make_experiments(args, results)
    done = run_all(experiments, results, Path(args.cache) / "claims", args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


def make_experiments(args: argparse.Namespace, results: Results) -> list[Experiment]:
    """For every task and kind three rates on the tuning seed, then the seeds."""
    keys = ("rows", "epochs", "batch_size", "precision", "tuning_seed")
    shared = {k: SUITE[k] for k in keys}
    get_engine = functools.lru_cache(maxsize=2)(functools.partial(make_engine, args))
    experiments = []
    for task in SUITE["tasks"]:
        for kind, settings in SUITE["kinds"].items():
            config = shared | settings | {"rates": SUITE[settings["rates"]]}
            names = [f"{task}/tune-{kind}-{rate:g}" for rate in config["rates"]]
            for name, rate in zip(names, config["rates"], strict=True):
                run = functools.partial(measure, get_engine, task, kind, SUITE["tuning_seed"], rate)
                experiments.append(Experiment(name, config | {"rate": rate}, run))
            for seed in SUITE["seeds"]:
                run = functools.partial(report, get_engine, results, task, kind, seed)
                name = f"{task}/{kind}-seed{seed}"
                experiments.append(Experiment(name, config | {"seed": seed}, run, tuple(names)))
    return experiments


def make_engine(args: argparse.Namespace, task: str, seed: int) -> Engine:
    """Model and data of one task and seed."""
    flags = {
        "model": args.model,
        "data": str(Path(args.data) / task),
        "budget": "1%",  # not used: the placement is given
        "metric": SUITE["tasks"][task]["metric"],
        "precision": SUITE["precision"],
        "seed": seed,
        "train.max_rows": SUITE["rows"],
        "train.epochs": SUITE["epochs"],
        "train.batch_size": SUITE["batch_size"],
    }
    folder = RunFolder(Path(args.cache) / f"{task}-{seed}")
    return Engine(make_plan(load_config(None, (), flags)), folder, is_main=True)


def report(get_engine: Any, results: Results, task: str, kind: str, seed: int) -> dict[str, Any]:
    """One reported seed, at the best rate of the tuning seed (the smaller on a tie)."""
    rates = SUITE[SUITE["kinds"][kind]["rates"]]
    found = {r: results.get(f"{task}/tune-{kind}-{r:g}")["result"]["metric"] for r in rates}
    best = max(rates, key=lambda r: (found[r], -r))
    return measure(get_engine, task, kind, seed, best)


def measure(get_engine: Any, task: str, kind: str, seed: int, rate: float) -> dict[str, Any]:
    """Train one kind at its usual places."""
    engine = get_engine(task, seed)
    settings = SUITE["kinds"][kind]
    sizes = {kind: settings["size"]} if "size" in settings else None
    options = {kind: settings["options"]} if "options" in settings else None
    space = make_space(engine.plan.sites, (kind,), sizes=sizes, options=options)
    outcome = engine.evaluator.train(space.full(), name=kind, seed=seed, lr=rate)
    return {
        "metric": outcome.metrics[engine.plan.metric],
        "best_epoch": outcome.best_epoch,
        "n_params": outcome.n_params,
        "head_params": outcome.head_params,
        "lr": rate,
        "train_seconds": outcome.seconds,
    }


if __name__ == "__main__":
    main()
