"""Every kind alone on small real tasks: metric, parameters, time.

    python -m benchmarks.kinds.quality --model FOLDER --data FOLDER_OF_TASKS
    python -m benchmarks.kinds.quality --image-model FOLDER --images FOLDER_OF_MNIST

The first is text, the second images; one command may do both. Start it in as many processes as
there are cores; they share the work. Stop and start it at will.
"""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
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
IMAGES = SUITE | SUITE["images"]  # the same form, with its own model, rows, tasks and kinds
SHARED = ("rows", "epochs", "batch_size", "precision", "tuning_seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of the encoder")
    parser.add_argument("--data", help="folder with one folder per task")
    parser.add_argument("--image-model", help="folder of a ViT trained on MNIST")
    parser.add_argument("--images", help="folder with train.npz and validation.npz of MNIST")
    parser.add_argument("--cache", default="runs/bench-kinds", help="finished trainings, reused")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after this time")
    args = parser.parse_args()
    text, images = (args.model, args.data), (args.image_model, args.images)
    if any(len(set(map(bool, pair))) > 1 for pair in (text, images)) or not any(text + images):
        parser.error("give --model and --data, or --image-model and --images, or all four")
    torch.set_num_threads(1)
    results = Results(HERE / "quality")
    experiments = []
    if all(text):
        experiments += make_experiments(args, SUITE, results)
    if all(images):
        experiments += [*untouched(args), *make_experiments(args, IMAGES, results)]
    done = run_all(experiments, results, Path(args.cache) / "claims", args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


def make_experiments(
    args: argparse.Namespace, suite: dict[str, Any], results: Results
) -> list[Experiment]:
    """For every task and kind three rates on the tuning seed, then the seeds."""
    shared = {k: suite[k] for k in SHARED}
    get_engine = functools.lru_cache(maxsize=2)(functools.partial(make_engine, args, suite))
    experiments = []
    for task in suite["tasks"]:
        for kind, settings in suite["kinds"].items():
            config = shared | settings | {"rates": suite[settings["rates"]]}
            names = [f"{task}/tune-{kind}-{rate:g}" for rate in config["rates"]]
            for name, rate in zip(names, config["rates"], strict=True):
                run = functools.partial(
                    measure, get_engine, config, task, kind, suite["tuning_seed"], rate
                )
                experiments.append(Experiment(name, config | {"rate": rate}, run))
            for seed in suite["seeds"]:
                run = functools.partial(report, get_engine, results, config, task, kind, seed)
                name = f"{task}/{kind}-seed{seed}"
                experiments.append(Experiment(name, config | {"seed": seed}, run, tuple(names)))
    return experiments


def make_engine(args: argparse.Namespace, suite: dict[str, Any], task: str, seed: int) -> Engine:
    """Model and data of one task and seed."""
    is_image = task in IMAGES["tasks"]
    flags = {
        "model": args.image_model if is_image else args.model,
        "data": str(shifted_digits(args) if is_image else Path(args.data) / task),
        "budget": "1%",  # not used: the placement is given
        "metric": suite["tasks"][task]["metric"],
        "precision": suite["precision"],
        "seed": seed,
        "train.max_rows": suite["rows"],
        "train.epochs": suite["epochs"],
        "train.batch_size": suite["batch_size"],
    }
    if is_image:
        flags["task"] = "image-cls"
    folder = RunFolder(Path(args.cache) / f"{task}-{seed}")
    return Engine(make_plan(load_config(None, (), flags)), folder, is_main=True)


def shifted_digits(args: argparse.Namespace) -> Path:
    """Folder in the cache with the digits inverted and turned by 90 degrees; made once."""
    folder = Path(args.cache) / "digits-shifted"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        target, part = folder / f"{split}.npz", folder / f"{split}-{os.getpid()}.part"
        if not target.is_file():
            with np.load(Path(args.images) / f"{split}.npz") as file, part.open("wb") as out:
                images = np.rot90(255 - file["images"], axes=(1, 2))  # (N, 28, 28) uint8
                np.savez_compressed(out, images=np.ascontiguousarray(images), labels=file["labels"])
            part.replace(target)  # several processes may be at it
    return folder


def untouched(args: argparse.Namespace) -> list[Experiment]:
    """The image model as it comes, on the shifted validation images."""

    def run(task: str) -> dict[str, Any]:
        engine = make_engine(args, IMAGES, task, SUITE["tuning_seed"])
        metrics = engine.phases.evaluate(engine.model)
        return {"metric": metrics[engine.plan.metric], "n_params": 0}

    config = {"precision": IMAGES["precision"]}
    return [
        Experiment(f"{task}/untouched", config, functools.partial(run, task))
        for task in IMAGES["tasks"]
    ]


def report(
    get_engine: Any, results: Results, settings: dict[str, Any], task: str, kind: str, seed: int
) -> dict[str, Any]:
    """One reported seed, at the best of the rates on the tuning seed (the smaller on a tie)."""
    names = {r: f"{task}/tune-{kind}-{r:g}" for r in settings["rates"]}
    found = {r: results.get(name)["result"]["metric"] for r, name in names.items()}
    best = max(found, key=lambda r: (found[r], -r))
    return measure(get_engine, settings, task, kind, seed, best)


def measure(
    get_engine: Any, settings: dict[str, Any], task: str, kind: str, seed: int, rate: float
) -> dict[str, Any]:
    """Train one kind at its usual places."""
    engine = get_engine(task, seed)
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
