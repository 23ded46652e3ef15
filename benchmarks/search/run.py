"""Every search method and plain LoRA at one budget, each at its own cost and at equal compute.

    python -m benchmarks.search.run --model FOLDER --data FOLDER_OF_TASKS

Start it in as many processes as there are cores; they share the work. Stop and start it at will.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, digest, run_all
from prunepeft.compare import Cell
from prunepeft.compare.cells import run_equal, run_own
from prunepeft.config import RunConfig, load_config
from prunepeft.state import RunFolder, read_json
from prunepeft.strategies import METHODS

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
TUNED = "lora-all"


class Bench:
    """The cells of one suite.

    Args:
        suite: Content of suite.yaml.
        model: Folder of the model.
        data: Folder with one folder per task.
        cache: Where run folders go.
        results: Where the result files are.
    """

    def __init__(
        self, suite: dict[str, Any], model: str, data: Path, cache: Path, results: Results
    ) -> None:
        self.suite, self.model, self.data = suite, model, data
        self.cache, self.results = cache, results

    def experiments(self) -> list[Experiment]:
        """Task by task, all at their own cost first, then at equal compute; seed by seed."""
        found = [self._tuning(t, r) for t in self.suite["tasks"] for r in self.suite["rates"]]
        for task, cost, seed in itertools.product(
            self.suite["tasks"], ("own", "equal"), self.suite["seeds"]
        ):
            tuning = tuple(tuning_name(task, rate) for rate in self.suite["rates"])
            for method in methods_of(self.suite, cost):
                others = [
                    cell_name(task, "own", m, seed) for m in (method, self.suite["reference"])
                ]
                needs = (*tuning, *others) if cost == "equal" else tuning
                run = self._own if cost == "own" else self._equal
                call = functools.partial(run, task, method, seed)
                config = self._common(task, method)
                config |= {"seed": seed, "cost": cost, "method": method}
                found.append(Experiment(cell_name(task, cost, method, seed), config, call, needs))
        return found

    def best_rate(self, task: str) -> float:
        """The learning rate with the best metric on the tuning seed, the smaller on a tie."""
        values = {r: self._cell(tuning_name(task, r)).metric for r in self.suite["rates"]}
        return max(values, key=lambda r: (values[r], -r))

    def _tuning(self, task: str, rate: float) -> Experiment:
        config = self._common(task, TUNED) | {"rate": rate, "seed": self.suite["tuning_seed"]}
        return Experiment(
            tuning_name(task, rate), config, functools.partial(self._tune, task, rate)
        )

    def _tune(self, task: str, rate: float) -> dict[str, Any]:
        place = self._place(task, TUNED, rate)
        config = self._config(task, TUNED, rate)
        seed = self.suite["tuning_seed"]
        return self._record(lambda: run_own(config, TUNED, seed, place), TUNED, rate)

    def _own(self, task: str, method: str, seed: int) -> dict[str, Any]:
        rate = self.best_rate(task)
        place, config = self._place(task, method, rate), self._config(task, method, rate)
        run = functools.partial(run_own, config, self._method(method), seed, place)
        return self._record(run, method, rate)

    def _equal(self, task: str, method: str, seed: int) -> dict[str, Any]:
        rate = self.best_rate(task)
        own, reference = (
            self._cell(cell_name(task, "own", m, seed)) for m in (method, self.suite["reference"])
        )
        place, config = self._place(task, method, rate), self._config(task, method, rate)
        own = replace(own, method=self._method(method))
        return self._record(lambda: run_equal(config, own, reference, place), method, rate)

    def _cell(self, name: str) -> Cell:
        found = self.results.get(name)["result"]
        return Cell.from_dict(found | {"run": str(self.cache / found["run"])})

    def _config(self, task: str, method: str, rate: float) -> RunConfig:
        suite = self.suite
        return load_config(
            None,
            (),
            {
                "model": self.model,
                "data": str(self.data / task),
                "budget": suite["budget"],
                "metric": suite["tasks"][task]["metric"],
                "precision": suite["precision"],
                "train.max_rows": suite["tasks"][task]["rows"],
                "train.epochs": suite["epochs"],
                "train.batch_size": suite["batch_size"],
                "train.lr": rate,
                "method": method if method in METHODS else "prunepeft",
                **self._settings(method),
            },
        )

    def _common(self, task: str, method: str) -> dict[str, Any]:
        """Everything that all cells of a method on a task depend on."""
        no = ("tasks", "seeds", "settings", "leave_out", "plain", "variants")
        shared = {k: v for k, v in self.suite.items() if k not in no}
        own = self._settings(method)
        return shared | self.suite["tasks"][task] | {"task": task, "settings": own}

    def _settings(self, method: str) -> dict[str, Any]:
        """What is set for this row of the table; a variant's name is not that of its method."""
        variant = self.suite["variants"].get(method)
        return dict(self.suite["settings"].get(method, {}) if variant is None else variant)

    def _method(self, method: str) -> str:
        """What runs in this row of the table."""
        return self._settings(method).get("method", method)

    def _place(self, task: str, method: str, rate: float) -> Path:
        """Folder of run folders, another one for other settings."""
        return self.cache / f"{task}-{digest(self._common(task, method) | {'rate': rate})}"

    def _record(self, run: Callable[[], Cell], method: str, rate: float) -> dict[str, Any]:
        """The cell under its name in the table, and what else the table says about the run.

        Processor seconds are those of this process, which has one thread: other work on the machine
        hardly changes them. They hold loading and the report as well, and are too few if the run
        had been begun before.
        """
        began = time.process_time()
        cell = run()
        spent = time.process_time() - began
        place = Path(cell.run).relative_to(self.cache)
        found: dict[str, Any] = cell.to_dict() | {"method": method, "lr": rate, "run": str(place)}
        found["processor_seconds"] = round(spent, 2)
        if cell.metric is not None:
            result = read_json(RunFolder(cell.run).result_file)
            found["limit"] = result["budget"]["limit"]
            found |= {k: result["task"][k] for k in ("n_train", "n_validation")}
            found["modules"] = {m["id"]: m["size"] for m in result["placement"]["modules"]}
        return found


def methods_of(suite: dict[str, Any], cost: str = "own") -> Sequence[str]:
    """The reference, its variants, all registered methods and plain LoRA, less what is left out.

    Variants have their own cost alone: at equal compute they are the reference again.
    """
    variants = suite["variants"] if cost == "own" else ()
    names = (suite["reference"], *variants, *METHODS.names(), *suite["plain"])
    return [m for m in dict.fromkeys(names) if m not in suite["leave_out"]]


def cell_name(task: str, cost: str, method: str, seed: int) -> str:
    """Name of a result file."""
    return f"{task}/{cost}-{method}-seed{seed}"


def tuning_name(task: str, rate: float) -> str:
    """The same for a learning rate."""
    return f"{task}/tune-{rate:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--cache", default="runs/bench-search", help="run folders, reused")
    parser.add_argument("--minutes", type=float, default=180, help="start nothing after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, cache = Results(HERE / "results"), Path(args.cache)
    bench = Bench(SUITE, args.model, Path(args.data), cache, results)
    done = run_all(bench.experiments(), results, cache / "claims", args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


if __name__ == "__main__":
    main()
