"""Search and training against plain peft LoRA, and the search against the authors' recipe.

    python -m benchmarks.search_cost.run --model FOLDER_OF_MINILM_L6 --data FOLDER_OF_TASKS

Start it in as many processes as there are cores; they share the work. Stop and start it at will.
"""

import argparse
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, run_all
from benchmarks.search_cost import plain
from benchmarks.search_cost.reference import Reference
from prunepeft.candidates import LORA_ALL_ROLES, make_lora_baseline
from prunepeft.config import load_config
from prunepeft.engine import Engine
from prunepeft.plan import Plan, make_plan, problem_of
from prunepeft.state import RunFolder

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
PLAIN = ("peft", "lora-all")


class Bench:
    """All cells. Arguments: folders of the model and of the tasks, and what is known so far."""

    def __init__(self, model: str, data: Path, results: Results) -> None:
        self.model, self.data, self.results = model, data, results

    def experiments(self) -> list[Experiment]:
        """Rates first, then what decides, seed by seed, then the reference, then the variants."""
        found = []
        for task in SUITE["tasks"]:
            for rate in SUITE["rates"]:
                run = partial(self.peft, task, SUITE["tuning_seed"], rate)
                config = self._common(task, "peft") | {"rate": rate}
                found.append(Experiment(_tuning(task, rate), config, run))
        seeds, tasks, methods = SUITE["seeds"], SUITE["tasks"], (*PLAIN, *SUITE["methods"])
        deciding = [m for m in methods if m in (*PLAIN, "prunepeft")]
        variants = [m for m in methods if m not in deciding]
        found += [self._experiment(*case) for case in product(seeds, tasks, deciding)]
        for task in tasks:
            config = self._common(task, "reference") | SUITE["reference"]
            run = partial(self.reference, task)
            needs = (f"{task}/prunepeft-seed{seeds[0]}",)
            found.append(Experiment(f"{task}/reference", config, run, needs))
        found += [self._experiment(*case) for case in product(seeds, tasks, variants)]
        return found

    def _experiment(self, seed: int, task: str, method: str) -> Experiment:
        needs = tuple(_tuning(task, rate) for rate in SUITE["rates"])
        config = self._common(task, method) | {"seed": seed, "method": method}
        run = partial(self.cell, task, method, seed)
        return Experiment(f"{task}/{method}-seed{seed}", config, run, needs)

    def cell(self, task: str, method: str, seed: int) -> dict[str, Any]:
        """One method with one seed at the best rate of plain LoRA."""
        names = {r: self.results.get(_tuning(task, r)) for r in SUITE["rates"]}
        values = {rate: found["result"]["metric"] for rate, found in names.items()}
        rate = max(values, key=lambda r: (values[r], -r))
        if method == "peft":
            return self.peft(task, seed, rate)
        return self.ours(task, method, seed, rate)

    def peft(self, task: str, seed: int, rate: float) -> dict[str, Any]:
        """Plain LoRA as most people train it."""
        plan = self._plan(task, seed, rate, {})
        rank = max(make_lora_baseline(plan.sites, plan.limit, roles=LORA_ALL_ROLES).sizes.values())
        metric = SUITE["tasks"][task]["metric"]
        found = plain.train(self.model, plan.splits, metric, rank, seed, rate, SUITE)
        return found | {"lr": rate}

    def ours(self, task: str, method: str, seed: int, rate: float) -> dict[str, Any]:
        """Search and training, each in processor seconds with everything they do."""
        plan = self._plan(task, seed, rate, SUITE["methods"].get(method, {}))
        with tempfile.TemporaryDirectory() as place:
            engine = Engine(plan, RunFolder(place), is_main=True)
            began, record = time.process_time(), {}
            if method == "lora-all":
                placement = make_lora_baseline(plan.sites, plan.limit, roles=LORA_ALL_ROLES)
            else:
                problem = problem_of(plan, engine.evaluator, engine.on_event)
                found = plan.strategy.search(problem)
                placement = found.placement
                record = {"search_steps": found.steps, "search_runs": found.runs}
            searched = time.process_time() - began
            outcome = engine.evaluator.train(placement, name=method, seed=seed, lr=rate)
            spent = time.process_time() - began
        return record | {
            "metric": outcome.metrics[plan.metric],
            "curve": [entry[plan.metric] for entry in outcome.curve],
            "seconds": spent,
            "search_seconds": searched,
            "train_steps": outcome.steps,
            "n_params": outcome.n_params,
            "n_modules": len(placement),
            "lowest_layer": min(slot.layer for slot in placement),
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "lr": rate,
        }

    def reference(self, task: str) -> dict[str, Any]:
        """The search of the method's authors, down to as many modules as fit the budget."""
        seed = SUITE["seeds"][0]
        plan = self._plan(task, seed, SUITE["rates"][0], {"space": "paper", "budget": "6 modules"})
        return Reference(self.model, plan.splits, seed, SUITE).search(keep=6)

    def _plan(self, task: str, seed: int, rate: float, own: dict[str, Any]) -> Plan:
        flags = {
            "model": self.model,
            "data": str(self.data / task),
            "budget": SUITE["budget"],
            "metric": SUITE["tasks"][task]["metric"],
            "precision": SUITE["precision"],
            "seed": seed,
            "train.max_rows": SUITE["tasks"][task]["rows"],
            "train.max_length": SUITE["max_length"],
            "train.epochs": SUITE["epochs"],
            "train.batch_size": SUITE["batch_size"],
            "train.eval_batch_size": SUITE["eval_batch_size"],
            "train.lr": rate,
        }
        return make_plan(load_config(None, (), flags | own))

    def _common(self, task: str, method: str) -> dict[str, Any]:
        no = ("tasks", "seeds", "methods", "reference")
        shared = {k: v for k, v in SUITE.items() if k not in no}
        return shared | SUITE["tasks"][task] | {"own": SUITE["methods"].get(method, {})}


def _tuning(task: str, rate: float) -> str:
    return f"{task}/tune-{rate:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--minutes", type=float, default=180, help="start nothing after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results")
    bench = Bench(args.model, Path(args.data), results)
    claims = Path("runs/bench-search-cost/claims")
    done = run_all(bench.experiments(), results, claims, args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


if __name__ == "__main__":
    main()
