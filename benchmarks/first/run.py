"""First table: plain LoRA, adapters, ablations and PrunePEFT at one budget on small real tasks.

    python -m benchmarks.first.run --model FOLDER --data FOLDER_OF_TASKS

Start it in as many processes as there are cores; they share the work. Stop and start it at will.
"""

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Experiment, Results, run_all
from prunepeft.candidates import LORA_ALL_ROLES, make_lora_baseline, make_space
from prunepeft.config import load_config
from prunepeft.criteria import PAPER_CRITERIA
from prunepeft.engine import Engine
from prunepeft.evaluate import Outcome, Scored
from prunepeft.kinds import count_params
from prunepeft.plan import Plan, make_plan, problem_of
from prunepeft.space import Placement
from prunepeft.state import RunFolder
from prunepeft.strategies import HybridPruning, SearchResult

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))


class SharedScores:
    """Records all criteria in every run, so that searches that train the same model share it."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator = evaluator

    def score(self, placement: Placement, criteria: tuple[str, ...], **kwargs: Any) -> Scored:
        scored = self.evaluator.score(placement, PAPER_CRITERIA, **kwargs)
        return replace(scored, saliency={c: scored.saliency[c] for c in criteria})


class Bench:
    """One task and seed on one model."""

    def __init__(self, args: argparse.Namespace, task: str, seed: int) -> None:
        settings = {
            "model": args.model,
            "data": str(Path(args.data) / task),
            "budget": SUITE["budget"],
            "metric": SUITE["tasks"][task]["metric"],
            "precision": SUITE["precision"],
            "seed": seed,
            "train.max_rows": SUITE["tasks"][task]["rows"],
            "train.epochs": SUITE["epochs"],
            "train.batch_size": SUITE["batch_size"],
        }
        self.config = load_config(None, (), settings)
        self.plan: Plan = make_plan(self.config)
        folder = RunFolder(Path(args.cache) / f"{task}-{seed}")
        self.engine = Engine(self.plan, folder, is_main=True)
        self.evaluator = self.engine.evaluator
        self.seed = seed

    def placement(
        self, method: str, lr: float, single: str
    ) -> tuple[Placement, SearchResult | None]:
        """What a method trains, and what its search cost."""
        sites, limit = self.plan.sites, self.plan.limit
        if method == "lora_qv":
            return make_lora_baseline(sites, limit), None
        if method == "lora_all":
            return make_lora_baseline(sites, limit, roles=LORA_ALL_ROLES), None
        if method == "serial":
            return self._serial(), None
        if method == "union":
            return self.plan.space.full(), None
        mode = {"random": "random", "single": f"single:{single}"}.get(method, "hybrid")
        return self._search(HybridPruning(mode=mode), lr, low=method == "prunepeft_low")

    def train(self, placement: Placement, name: str, lr: float) -> Outcome:
        return self.evaluator.train(placement, name=name, seed=self.seed, lr=lr)

    def _search(
        self, strategy: HybridPruning, lr: float, low: bool
    ) -> tuple[Placement, SearchResult]:
        self.evaluator.target = replace(
            self.evaluator.target,
            search_lr=lr,
            context={**self.evaluator.target.context, "search_lr": lr},
        )
        problem = problem_of(self.plan, SharedScores(self.evaluator), lambda kind, **fields: None)
        if low:
            fidelity = replace(problem.fidelity, data=SUITE["low_fidelity"])
            problem = replace(problem, fidelity=fidelity)
        found = strategy.search(problem)
        return found.placement, found

    def _serial(self) -> Placement:
        """A serial adapter after every feed-forward, as wide as the budget allows."""
        best = None
        for width in range(1, 1025):
            space = make_space(
                self.plan.sites, ("serial_adapter",), sizes={"serial_adapter": width}
            )
            if count_params(space.full()) > self.plan.limit:
                break
            best = space.full()
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--cache", default="runs/bench-first", help="finished trainings, reused")
    parser.add_argument("--minutes", type=float, default=180, help="start nothing after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results")
    experiments = make_experiments(args, results)
    done = run_all(experiments, results, Path(args.cache) / "claims", args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


def make_experiments(args: argparse.Namespace, results: Results) -> list[Experiment]:
    """Tuning first, then the methods, task by task."""
    shared = {k: v for k, v in SUITE.items() if k not in ("tasks", "methods", "seeds")}
    experiments = []
    get_bench = functools.lru_cache(maxsize=2)(lambda task, seed: Bench(args, task, seed))
    for task, settings in SUITE["tasks"].items():
        common = shared | settings
        tuning = []
        for method in ("lora_qv", "lora_all"):
            for rate in SUITE["rates"]:
                name = f"{task}/tune-{method}-{rate:g}"
                run = functools.partial(_tune, get_bench, task, method, rate)
                experiments.append(Experiment(name, {**common, "rate": rate}, run))
                tuning.append(name)
        choices = []
        for criterion in PAPER_CRITERIA:
            name = f"{task}/tune-single-{criterion}"
            run = functools.partial(_tune_single, get_bench, results, task, criterion)
            experiments.append(
                Experiment(name, {**common, "criterion": criterion}, run, tuple(tuning))
            )
            choices.append(name)
        for seed in SUITE["seeds"]:
            for method in SUITE["methods"]:
                needs = (*tuning, *choices) if method == "single" else tuple(tuning)
                run = functools.partial(_measure, get_bench, results, task, seed, method)
                config = {**common, "seed": seed, "method": method}
                experiments.append(Experiment(f"{task}/{method}-seed{seed}", config, run, needs))
    return experiments


def best_rate(results: Results, task: str, method: str) -> float:
    """The learning rate with the best metric on the tuning seed, the smaller on a tie."""
    values = {
        r: results.get(f"{task}/tune-{method}-{r:g}")["result"]["metric"] for r in SUITE["rates"]
    }
    return max(values, key=lambda r: (values[r], -r))


def best_criterion(results: Results, task: str) -> str:
    """The single criterion with the best metric on the tuning seed."""
    names = {c: results.get(f"{task}/tune-single-{c}")["result"]["metric"] for c in PAPER_CRITERIA}
    return max(names, key=lambda c: names[c])


def _tune(get_bench: Any, task: str, method: str, rate: float) -> dict[str, Any]:
    bench = get_bench(task, SUITE["tuning_seed"])
    placement, _ = bench.placement(method, rate, "")
    return _record(bench, bench.train(placement, method, rate), None, placement, rate)


def _tune_single(get_bench: Any, results: Results, task: str, criterion: str) -> dict[str, Any]:
    bench = get_bench(task, SUITE["tuning_seed"])
    rate = best_rate(results, task, "lora_all")
    placement, found = bench.placement("single", rate, criterion)
    return _record(bench, bench.train(placement, criterion, rate), found, placement, rate)


def _measure(get_bench: Any, results: Results, task: str, seed: int, method: str) -> dict[str, Any]:
    bench = get_bench(task, seed)
    rate = best_rate(results, task, "lora_qv" if method == "lora_qv" else "lora_all")
    single = best_criterion(results, task) if method == "single" else ""
    placement, found = bench.placement(method, rate, single)
    outcome = bench.train(placement, method, rate)
    return _record(bench, outcome, found, placement, rate) | (
        {"criterion": single} if single else {}
    )


def _record(
    bench: Bench, outcome: Outcome, found: SearchResult | None, placement: Placement, rate: float
) -> dict[str, Any]:
    record = {
        "metric": outcome.metrics[bench.plan.metric],
        "metrics": outcome.metrics,
        "best_epoch": outcome.best_epoch,
        "n_params": outcome.n_params,
        "limit": bench.plan.limit,
        "head_params": outcome.head_params,
        "lr": rate,
        "train_seconds": outcome.seconds,
        "train_steps": outcome.steps,
        "modules": {s.id: n for s, n in placement.sizes.items()},
        "n_train": len(bench.plan.splits.train),
        "n_validation": len(bench.plan.splits.validation),
    }
    if found is not None:
        record |= {"search_seconds": found.seconds, "search_steps": found.steps}
        record |= {"search_runs": found.runs, "strategy": found.history["strategy"]}
    return record


if __name__ == "__main__":
    main()
