"""How the cost of the search grows with layers, modules, tokens, rows, width and data.

    python -m benchmarks.scaling.run

Slopes are those of a straight line through the logarithms of size and seconds; `line` is one
through sizes and seconds themselves.
"""

import argparse
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.harness import Experiment, Results, run_all
from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import TrainSettings
from prunepeft.criteria import PAPER_CRITERIA, needs_of
from prunepeft.criteria.record import Recorder
from prunepeft.evaluate import Target
from prunepeft.kinds import count_params
from prunepeft.progress import SilentProgress
from prunepeft.sites import find_sites
from prunepeft.state import Journal
from prunepeft.strategies import HybridPruning, Problem
from prunepeft.supernet import attach
from prunepeft.tasks import Collator
from prunepeft.training import Phases, TrainerEvaluator

HERE = Path(__file__).parent
SUITE = yaml.safe_load((HERE / "suite.yaml").read_text("utf-8"))
ROLES = {
    "bert": ("q", "v", "k", "o", "up", "down"),
    "llama": ("q", "v", "k", "o", "up", "down", "gate"),
}
AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
VOCABULARY = 500


def make_model(family: str, layers: int, hidden: int) -> Any:
    """Random weights; heads of 64 features."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=max(1, hidden // 64),
        num_labels=2,
    )
    config.use_cache = False
    return AUTO[family].from_config(config, dtype=torch.float32)


def step_seconds(case: dict[str, Any], repeats: int, steps: int) -> dict[str, Any]:
    """Seconds of a recorded step of a supernet of LoRA, median of the repeats."""
    family = case["family"]
    model = make_model(family, case["layers"], case["hidden"])
    roles = tuple((role,) for role in ROLES[family][: case["lora"]])
    space = make_space(find_sites(model), ("lora",), sizes={"lora": 8}, roles={"lora": roles})
    net = attach(model, space.full()).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(5, VOCABULARY, (case["rows"], case["tokens"]))
    labels = ids if family == "llama" else torch.zeros(case["rows"], dtype=torch.long)
    times = []
    with Recorder.for_net(net, needs_of(PAPER_CRITERIA)) as recorder:
        for _ in range(repeats + 1):
            began = time.process_time()
            for _ in range(steps):
                net(input_ids=ids, labels=labels).loss.backward()
                recorder.step()
                optimizer.step()
                optimizer.zero_grad()
            times.append((time.process_time() - began) / steps)
    return {
        "seconds": statistics.median(times[1:]),
        "quartiles": statistics.quantiles(times[1:], n=4),
        "modules": len(space),
        "trainable": count_params(space.full()),
    }


def axis(family: str, name: str, values: list[int]) -> dict[str, Any]:
    """Seconds along one axis, in random order, and their slope."""
    found: dict[int, Any] = {}
    for value in random.sample(values, len(values)):
        case = SUITE["base"] | {"family": family, {"modules": "lora"}.get(name, name): value}
        found[value] = step_seconds(case, SUITE["repeats"], SUITE["steps"])
        print(family, name, value, f"{found[value]['seconds']:.4f}", flush=True)
    sizes = {v: found[v]["modules"] if name == "modules" else v for v in values}
    points = {str(sizes[v]): found[v] for v in values}
    pairs = [(sizes[v], found[v]["seconds"]) for v in values]
    return {"points": points, "slope": slope(pairs), "line": line(pairs)}


def search_over_data(values: list[int]) -> dict[str, Any]:
    """Seconds and steps of a whole search by rows of the training split."""
    found = {str(n): search_seconds(n) for n in random.sample(values, len(values))}
    points = {str(n): found[str(n)] for n in values}
    by = {key: slope([(n, points[str(n)][key]) for n in values]) for key in ("seconds", "steps")}
    straight = line([(n, points[str(n)]["seconds"]) for n in values])
    return {
        "points": points,
        "slope": by["seconds"],
        "slope_of_steps": by["steps"],
        "line": straight,
    }


def search_seconds(n: int) -> dict[str, Any]:
    """One search with the settings it has by default."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (n, 16), generator=draw).tolist()
    columns = {"input_ids": ids, "attention_mask": [[1] * 16] * n, "length": [16] * n}
    rows = Dataset.from_dict(columns | {"labels": [i % 2 for i in range(n)]})
    model = make_model("bert", 2, 128)
    phases = Phases(
        train=rows,
        validation=rows.select(range(16)),
        collator=Collator(0),
        compute=lambda predictions, labels: {"accuracy": 0.0},
        preprocess_logits=None,
        settings=TrainSettings(),
        device="cpu",
        bf16=False,
        progress=SilentProgress(),
    )
    target = Target("accuracy", True, ["classifier"], "SEQ_CLS", True, 1e-3, {})
    with tempfile.TemporaryDirectory() as place:
        journal = Journal(Path(place) / "journal")
        evaluator = TrainerEvaluator(model, phases, target, journal, Path(place))
        space = make_space(find_sites(model), sizes={"lora": 8, "serial_adapter": 8})
        settings = phases.settings
        problem = Problem(
            space,
            count_params(space.full()) // 2,
            "parameters",
            evaluator,
            n,
            Fidelity(),
            0,
            batch_size=settings.batch_size,
            train_steps=settings.epochs * (n // settings.batch_size),
        )
        strategy = HybridPruning()
        share = strategy.default_share(problem)
        problem = Problem(**{**vars(problem), "fidelity": Fidelity(share)})
        began = time.process_time()
        result = strategy.search(problem)
        seconds = time.process_time() - began
    print("search", n, f"{seconds:.2f}", result.steps, flush=True)
    return {"seconds": seconds, "steps": result.steps, "runs": result.runs, "share": share}


def slope(points: list[tuple[float, float]]) -> float:
    """Of log seconds over log size."""
    x, y = (np.log(np.array(column)) for column in zip(*points, strict=True))
    return float(np.polyfit(x, y, 1)[0])


def line(points: list[tuple[float, float]]) -> dict[str, float]:
    """The straight line through sizes and seconds, and the share of the variance it explains."""
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    per_unit, fixed = np.polyfit(x, y, 1)
    rest = float(((y - fixed - per_unit * x) ** 2).sum())
    explained = 1 - rest / float(((y - y.mean()) ** 2).sum())
    return {"fixed": float(fixed), "per_unit": float(per_unit), "r2": explained}


def make_experiments() -> list[Experiment]:
    """One per family and axis, and the search over data."""
    found = []
    for family in SUITE["families"]:
        for name, values in SUITE["axes"].items():
            fixed = {k: SUITE[k] for k in ("base", "repeats", "steps")}
            config = fixed | {"family": family, name: values}
            found.append(
                Experiment(f"{family}-{name}", config, partial(axis, family, name, values))
            )
    data = SUITE["search"]["data"]
    found.append(Experiment("search-data", {"data": data}, partial(search_over_data, data)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    claims = Path("runs/bench-scaling/claims")
    done = run_all(make_experiments(), Results(HERE / "results"), claims, args.minutes * 60)
    print("all up to date" if done else "stopped before the end; start again to go on")


if __name__ == "__main__":
    main()
