"""Quality of sparse tuning: plain LoRA trained as ever, with IST, and with layers drawn at random.

    python -m benchmarks.sparse_tuning.quality --model FOLDER --data FOLDER_OF_TASKS
    python -m benchmarks.sparse_tuning.quality --decoder FOLDER --text FOLDER_OF_TEXTS

One command may do both. Start it in as many processes as there are cores; they share the work.
Stop and start it at will. The run folders stay in the cache; `benchmarks.compression.quality`
compresses their adapters.
"""

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, digest, run_all
from benchmarks.sparse_tuning.prepared import prepare
from prunepeft.compare.cells import run_own
from prunepeft.config import RunConfig, load_config
from prunepeft.metrics import METRICS
from prunepeft.state import RunFolder, read_json

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
LORA = "lora-all"
BLOCKS = {"encoder": ("model", "data"), "decoder": ("decoder", "text")}


class Bench:
    """The trainings of one block of the suite.

    Args:
        block: `encoder` or `decoder`.
        model: Folder of the model.
        data: Folder with one folder per task.
        cache: Where data and run folders go.
        results: Where the result files are.
    """

    def __init__(self, block: str, model: str, data: Path, cache: Path, results: Results) -> None:
        self.settings = {k: v for k, v in SUITE.items() if k not in BLOCKS} | SUITE[block]
        self.model, self.data, self.cache, self.results = model, data, cache, results

    def experiments(self) -> list[Experiment]:
        """Per task the rates of every method that has its own, then seed by seed."""
        found = []
        for task in self.settings["tasks"]:
            for method, own in self.settings["methods"].items():
                for rate in () if "tuned_as" in own else self.settings["rates"]:
                    run = partial(self.run, task, method, self.settings["tuning_seed"], rate)
                    config = self._common(task, method) | {"rate": rate}
                    found.append(Experiment(_tuning(task, method, rate), config, run))
        for seed in self.settings["seeds"]:
            for task in self.settings["tasks"]:
                for method in self.settings["methods"]:
                    config = self._common(task, method) | {"seed": seed}
                    run, needs = partial(self.report, task, method, seed), self._needs(task, method)
                    found.append(Experiment(f"{task}/{method}-seed{seed}", config, run, needs))
        return found

    def best_rate(self, task: str, method: str) -> float:
        """The best rate on the tuning seed, the smaller on a tie."""
        names = dict(zip(self.settings["rates"], self._needs(task, method), strict=True))
        values = {r: self.results.get(name)["result"]["metric"] for r, name in names.items()}
        better = METRICS.get(self.settings["tasks"][task]["metric"]).greater_is_better
        return max(values, key=lambda r: (values[r] if better else -values[r], -r))

    def report(self, task: str, method: str, seed: int) -> dict[str, Any]:
        """One seed at the best rate."""
        return self.run(task, method, seed, self.best_rate(task, method))

    def run(self, task: str, method: str, seed: int, rate: float) -> dict[str, Any]:
        """Train, and say what came of it."""
        config, place = self.config(task, method, seed, rate), self.place(task, method, seed, rate)
        began = time.process_time()
        cell = run_own(config, LORA, seed, place)
        spent = time.process_time() - began
        if cell.metric is None:
            raise RuntimeError(cell.error)
        result = read_json(RunFolder(cell.run).result_file)
        return {
            "metric": cell.metric,
            "metrics": dict(cell.metrics),
            "best_epoch": result["metric"]["best_epoch"],
            "n_params": cell.n_params,
            "head_params": result["head_params"],
            "lr": rate,
            "train_seconds": cell.train_seconds,
            "train_steps": cell.train_steps,
            "processor_seconds": round(spent, 2),
            "importance": _importance(RunFolder(cell.run)),
        }

    def place(self, task: str, method: str, seed: int, rate: float) -> Path:
        """Folder of one training."""
        what = digest(self._common(task, method) | {"rate": rate})
        return self.cache / "runs" / f"{task}-{method}-{seed}-{what}"

    def rows(self, task: str, seed: int) -> tuple[Path, Path]:
        """Folder of splits, and file of rows for tuning."""
        place = self.cache / "data" / f"{task}-{seed}"
        return prepare(self.data / task, place, self.settings, seed)

    def config(self, task: str, method: str, seed: int, rate: float) -> RunConfig:
        """Settings of one training."""
        settings = self.settings
        own: Mapping[str, Any] = settings["methods"][method]
        flags = {
            "model": self.model,
            "data": str(self.rows(task, seed)[0]),
            "budget": settings["budget"],
            "metric": settings["tasks"][task]["metric"],
            "precision": settings["precision"],
            "train.epochs": settings["epochs"],
            "train.batch_size": settings["batch_size"],
            "train.lr": rate,
        }
        if "max_length" in settings:
            flags["train.max_length"] = settings["max_length"]
        if "ist" in own:
            ist = settings.get("ist", {}) | own["ist"]
            flags |= {"ist.enabled": True, **{f"ist.{k}": v for k, v in ist.items()}}
        return load_config(None, (), flags)

    def _common(self, task: str, method: str) -> dict[str, Any]:
        """Everything that all trainings of a method on a task depend on."""
        settings = {k: v for k, v in self.settings.items() if k not in ("tasks", "seeds")}
        own = settings.pop("methods")[method]
        return settings | self.settings["tasks"][task] | {"task": task, "method": own}

    def _needs(self, task: str, method: str) -> tuple[str, ...]:
        tuned = self.settings["methods"][method].get("tuned_as", method)
        return tuple(_tuning(task, tuned, rate) for rate in self.settings["rates"])


def make_benches(args: argparse.Namespace, results: Results) -> list[Bench]:
    """One for every block of which model and data are given."""
    cache = Path(args.cache)
    pairs = {block: [getattr(args, name) for name in names] for block, names in BLOCKS.items()}
    return [Bench(b, m, Path(d), cache, results) for b, (m, d) in pairs.items() if m and d]


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """The flags that this and the benchmark of compression share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", help="folder of the encoder")
    parser.add_argument("--data", help="folder with one folder per task")
    parser.add_argument("--decoder", help="folder of the decoder")
    parser.add_argument("--text", help="folder with one folder of texts per task")
    parser.add_argument("--cache", default="runs/bench-sparse", help="data and finished trainings")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after this time")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "quality")
    benches = make_benches(args, results)
    if not benches:
        parser.error("give --model and --data, or --decoder and --text, or all four")
    experiments = [e for bench in benches for e in bench.experiments()]
    claims = Path(args.cache) / "claims"
    done = run_all(experiments, results, claims, args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


def _tuning(task: str, method: str, rate: float) -> str:
    return f"{task}/tune-{method}-{rate:g}"


def _importance(folder: RunFolder) -> dict[str, float]:
    """What IST thinks of the layers at the end; empty without IST."""
    lines = (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    found = [entry["importance"] for entry in entries if entry.get("kind") == "ist"]
    return found[-1] if found else {}


if __name__ == "__main__":
    main()
