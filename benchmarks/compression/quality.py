"""What compression costs trained adapters, and what merging compressed ones costs.

    python -m benchmarks.compression.quality --model FOLDER --data FOLDER_OF_TASKS
    python -m benchmarks.compression.quality --decoder FOLDER --text FOLDER_OF_TEXTS

Needs the runs of `benchmarks.sparse_tuning.quality` in the same cache. One command may do both.
Start it in as many processes as there are cores; they share the work. Stop and start it at will.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from benchmarks.harness import Experiment, Results, run_all
from benchmarks.sparse_tuning import quality as sparse
from prunepeft import shipping
from prunepeft.compare.settings import folder_of
from prunepeft.compression import Settings, compress_adapter, decompress_adapter, merge_adapters
from prunepeft.compression.folder import adapter_path, read_adapter_folder
from prunepeft.compression.starts import is_head
from prunepeft.data import load_rows
from prunepeft.engine import Engine
from prunepeft.metrics import METRICS
from prunepeft.run import plan_as_trained
from prunepeft.state import RunFolder, write_tensors
from prunepeft.supernet import detach
from prunepeft.supernet.export.source import CONFIG_FILE, WEIGHTS_FILE

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
METHOD = "lora"
FORMS = ("originals", "compressed")


class Expert:
    """A trained adapter of one task and seed.

    Args:
        bench: The suite it was trained in.
        task: Its task.
        seed: Its seed.
    """

    def __init__(self, bench: sparse.Bench, task: str, seed: int) -> None:
        self.task = task
        place = bench.place(task, METHOD, seed, bench.best_rate(task, METHOD))
        self.run = RunFolder(folder_of(place, sparse.LORA, "own", seed))
        self.tune = bench.rows(task, seed)[1]
        self.metric = bench.settings["tasks"][task]["metric"]
        self.greater_is_better = METRICS.get(self.metric).greater_is_better

    @cached_property
    def engine(self) -> Engine:
        """Base model and data."""
        return Engine(plan_as_trained(self.run), self.run, is_main=False)

    @contextmanager
    def net(self) -> Iterator[PeftModel]:
        """The base model with the adapter on it."""
        net = PeftModel.from_pretrained(self.engine.model, str(adapter_path(self.run.path)))
        try:
            yield net
        finally:
            detach(net)

    def measure(self, net: PeftModel, tuning: bool = False) -> float:
        """The metric on the validation rows, or on those for tuning."""
        rows = self.engine.phases.validation
        if tuning:
            plan = self.engine.plan
            rows = self.engine.encode(load_rows(str(self.tune), like=plan.splits, offline=True))
        return self.engine.phases.evaluate(net, rows)[self.metric]


def compressed(bench: sparse.Bench, task: str, seed: int, density: float) -> dict[str, Any]:
    """One adapter at one density, alpha tuned; measured after a round trip through the disk."""
    expert = Expert(bench, task, seed)
    settings = Settings(density=density)
    with TemporaryDirectory() as place:
        small, back = Path(place) / "small", Path(place) / "back"
        tune = {"tune": str(expert.tune), "fixed": ("density",)}
        report = shipping.compress(expert.run.path, small, settings, **tune)
        decompress_adapter(small, back)
        tuned = expert.engine.measure(back)[expert.metric]
        compress_adapter(expert.run.path, Path(place) / "plain", settings)
        decompress_adapter(Path(place) / "plain", Path(place) / "plain-back")
        untuned = expert.engine.measure(Path(place) / "plain-back")[expert.metric]
    with expert.net() as net:
        before = expert.measure(net)
    kept = ("alpha", "n_params", "n_kept", "n_dense", "bits_per_param", "bytes_before", "bytes")
    return {k: report[k] for k in kept} | {
        "before": before,
        "metric": tuned,
        "alpha_1": untuned,
        "notes": report["notes"],
    }


def merged(bench: sparse.Bench, results: Results, seed: int, method: str, form: str) -> Any:
    """Modules of all tasks as one, each task with its own head; the scale is tuned."""
    settings = SUITE["merge"]
    experts = [Expert(bench, task, seed) for task in settings["tasks"]]
    with TemporaryDirectory() as place:
        folders = [_without_heads(e, Path(place) / e.task) for e in experts]
        if form == "compressed":
            for expert, folder in zip(experts, folders, strict=True):
                found = results.get(_name(expert.task, seed, settings["density"]))["result"]
                how = Settings(density=settings["density"], alpha=found["alpha"])
                compress_adapter(folder, folder.with_suffix(".small"), how)
            folders = [folder.with_suffix(".small") for folder in folders]
        values = {}
        for scale in settings["scales"]:
            out = Path(place) / f"merged-{scale:g}"
            merge_adapters(folders, out, method=method, scale=scale)
            values[scale] = read_adapter_folder(out).tensors
        tuned = [_scores(expert, values) for expert in experts]
    means = {s: sum(found[s] for found in tuned) / len(tuned) for s in values}
    best = max(means, key=lambda s: (means[s], -s))
    judged = {expert.task: _judged(expert, values[best]) for expert in experts}
    parts = ("merged", "alone", "heads")
    return {"scale": best, "tuning": {f"{s:g}": m for s, m in means.items()}} | {
        part: {task: found[part] for task, found in judged.items()} for part in parts
    }


def _scores(expert: Expert, values: Mapping[float, dict[str, Tensor]]) -> dict[float, float]:
    """Metric on the rows for tuning, by scale."""
    found, heads = {}, _heads(expert)
    with expert.net() as net:
        for scale, tensors in values.items():
            set_peft_model_state_dict(net, heads | tensors)
            found[scale] = expert.measure(net, tuning=True)
    return found


def _judged(expert: Expert, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Metric of the task's own adapter, of its head alone, and of its head on merged modules."""
    heads, found = _heads(expert), {}
    nothing = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with expert.net() as net:
        found["alone"] = expert.measure(net)
        for name, values in (("merged", tensors), ("heads", nothing)):
            set_peft_model_state_dict(net, heads | values)
            found[name] = expert.measure(net)
    return found


def _heads(expert: Expert) -> dict[str, Tensor]:
    own = read_adapter_folder(expert.run.path)
    return {n: t for n, t in own.tensors.items() if is_head(n, own.config)}


def _without_heads(expert: Expert, place: Path) -> Path:
    """The adapter with its modules alone: heads of other tasks have other classes."""
    source = read_adapter_folder(expert.run.path)
    place.mkdir()
    shutil.copy(source.path / CONFIG_FILE, place / CONFIG_FILE)
    own = {n: t for n, t in source.tensors.items() if not is_head(n, source.config)}
    write_tensors(place / WEIGHTS_FILE, own)
    return place


def _name(task: str, seed: int, density: float) -> str:
    return f"{task}/density-{density:g}-seed{seed}"


def make_experiments(bench: sparse.Bench, trained: Results, results: Results) -> list[Experiment]:
    """Every density of every adapter, then the merges; what is not trained yet is left out."""
    found, tasks = [], list(bench.settings["tasks"])
    for seed in bench.settings["seeds"]:
        runs = {task: trained.get(f"{task}/{METHOD}-seed{seed}") for task in tasks}
        for task in (t for t in tasks if runs[t]):
            for density in SUITE["densities"]:
                config = {"trained": runs[task]["config_digest"], "density": density}
                run = partial(compressed, bench, task, seed, density)
                found.append(Experiment(_name(task, seed, density), config, run))
        merge = SUITE["merge"]
        if not all(runs.get(task) for task in merge["tasks"]):
            continue
        needs = tuple(_name(task, seed, merge["density"]) for task in merge["tasks"])
        for method in merge["methods"]:
            for form in FORMS:
                config = merge | {"trained": [runs[t]["config_digest"] for t in merge["tasks"]]}
                run = partial(merged, bench, results, seed, method, form)
                name = f"merged/{method}-{form}-seed{seed}"
                found.append(Experiment(name, config, run, needs))
    return found


def main() -> None:
    parser: argparse.ArgumentParser = sparse.make_parser(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained, results = Results(sparse.HERE / "quality"), Results(HERE / "quality")
    benches = sparse.make_benches(args, trained)
    if not benches:
        parser.error("give --model and --data, or --decoder and --text, or all four")
    experiments = [e for bench in benches for e in make_experiments(bench, trained, results)]
    claims = Path(args.cache) / "claims-compression"
    done = run_all(experiments, results, claims, args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


if __name__ == "__main__":
    main()
