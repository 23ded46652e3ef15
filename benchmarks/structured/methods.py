"""What the methods of `benchmarks.structured.quality` do with one task, seed and learning rate.

A method gets a `Bench` with a base model of its own, for some cut it, and returns its result.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunepeft.budget import Fidelity
from prunepeft.candidates import LORA_ALL_ROLES, Roles, make_lora_baseline, make_space
from prunepeft.data import load_rows
from prunepeft.engine import Engine
from prunepeft.evaluate import Outcome, Watched
from prunepeft.kinds import count_params
from prunepeft.plan import problem_of
from prunepeft.sites import count_base_params, find_sites
from prunepeft.space import Placement
from prunepeft.structured import find_groups
from prunepeft.structured.scatter import scatter_adapter

NO_LIMIT = 10**12


@dataclass(frozen=True)
class Bench:
    """One task and seed on a fresh base model.

    Attributes:
        engine: Model, data and evaluator.
        settings: The block of the suite.
        seed: Of rows, first values and order.
        rate: Learning rate, of searching too.
        also: Name -> file of other rows to judge on.
        fresh: Makes the engine once more, with a base model that is whole.
    """

    engine: Engine
    settings: Mapping[str, Any]
    seed: int
    rate: float
    also: Mapping[str, str]
    fresh: Callable[[], Engine]

    def lora(self, rank: int, roles: Roles = LORA_ALL_ROLES) -> Placement:
        """Plain LoRA of one rank at these roles."""
        return make_lora_baseline(find_sites(self.engine.model), NO_LIMIT, roles=roles, rank=rank)

    def train(self, placement: Placement, name: str, start: str = "") -> Outcome:
        """Train for all epochs, from first values or from those of the run `start`."""
        more = {"start": start} if start else {}
        return self.engine.evaluator.train(
            placement, name=name, seed=self.seed, lr=self.rate, **more
        )


def untouched(bench: Bench) -> dict[str, Any]:
    """The model as it comes."""
    model = bench.engine.model
    return _record(bench, bench.engine.phases.evaluate(model)) | _elsewhere(bench, model)


def lora_all(bench: Bench) -> dict[str, Any]:
    """LoRA on all linear layers of the whole base."""
    placement = bench.lora(bench.settings["rank"])
    outcome = bench.train(placement, "lora")
    with bench.engine.trained(placement, outcome) as net:
        other = _elsewhere(bench, net)
    return _trained(bench, outcome) | other


def lora_small(bench: Bench) -> dict[str, Any]:
    """The same with the trainable parameters that Light-PEFT may have."""
    rank = max(1, round(bench.settings["rank"] * bench.settings["trainable"]))
    return _trained(bench, bench.train(bench.lora(rank), "lora"))


def lora_qv(bench: Bench) -> dict[str, Any]:
    """LoRA on query and value of the whole base."""
    placement = bench.lora(bench.settings["rank"], (("q", "v"),))
    return _trained(bench, bench.train(placement, "lora q+v"))


def light_peft(bench: Bench, random: bool = False) -> dict[str, Any]:
    """Light-PEFT; with `random` heads and neurons go by chance, modules and ranks by score."""
    from prunepeft.strategies.light_peft import LightPeft

    engine, settings = bench.engine, bench.settings
    model, evaluator = engine.model, engine.evaluator
    ratios = settings["ratios"]
    strategy = LightPeft(head_ratio=ratios["heads"], neuron_ratio=ratios["neurons"])
    space = make_space(
        find_sites(model),
        ("lora",),
        sizes={"lora": settings["rank"]},
        options={"lora": {"alpha": 2.0 * settings["rank"]}},
        roles={"lora": _roles(model)},
    )
    problem = problem_of(
        engine.plan,
        RandomMasks(evaluator, bench.seed) if random else evaluator,
        lambda kind, **fields: None,
    )
    groups = find_groups(model)
    problem = replace(
        problem,
        space=space,
        groups=groups,
        limit=round(settings["trainable"] * count_params(space.full())),
        fidelity=Fidelity(1.0, settings["estimation_epochs"]),
    )
    found = strategy.search(problem)
    outcome = bench.train(found.placement, "light-peft", found.start)
    search = {"search_seconds": found.seconds, "search_steps": found.steps}
    with tempfile.TemporaryDirectory() as place, engine.trained(found.placement, outcome) as net:
        net.save_pretrained(f"{place}/cut")
        scatter_adapter(f"{place}/cut", found.cut, groups, f"{place}/full")
        whole = bench.fresh().measure(Path(place) / "full")[engine.plan.metric]
    return _trained(bench, outcome) | search | {"also": {"full model": whole}}


def random_masks(bench: Bench) -> dict[str, Any]:
    """Light-PEFT with heads and neurons that go by chance."""
    return light_peft(bench, random=True)


def gradual(bench: Bench, criterion: str, ratios: Mapping[str, float]) -> dict[str, Any]:
    """LoRAPrune's schedule with this criterion: prune while LoRA trains, cut, merge, judge."""
    from prunepeft.structured.base_criteria import make_base_criterion
    from prunepeft.structured.lora_prune import GradualPruner, cut_of

    engine, settings = bench.engine, bench.settings
    groups = find_groups(engine.model)
    options = {"seed": bench.seed} if criterion == "random" else None
    pruner = GradualPruner(
        groups, ratios, make_base_criterion(criterion, options), every=settings["every"]
    )
    placement = bench.lora(settings["rank"])
    watched = engine.evaluator.watch(
        placement,
        pruner,
        name=criterion,
        fidelity=Fidelity(1.0, settings["epochs"]),
        seed=bench.seed,
        init_seed=bench.seed,
    )
    engine.evaluator.merge(placement, watched.key, cut_of(watched.tensors, groups))
    metrics = engine.phases.evaluate(engine.model)
    record = _record(bench, metrics, watched) | {"n_params": count_params(placement)}
    return record | _elsewhere(bench, engine.model)


class RandomMasks:
    """The evaluator, but the masks of heads and neurons that it finds are random numbers."""

    def __init__(self, evaluator: Any, seed: int) -> None:
        self.evaluator = evaluator
        self.seed = seed

    def watch(self, *args: Any, **kwargs: Any) -> Watched:
        """The same training; the modules' scores are as found."""
        watched = self.evaluator.watch(*args, **kwargs)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = {
            name: torch.rand(tensor.shape, generator=generator)
            for name, tensor in sorted(watched.tensors.items())
            if name.startswith("mask.")
        }
        return replace(watched, tensors={**watched.tensors, **drawn})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evaluator, name)


METHODS = {
    "untouched": untouched,
    "lora_all": lora_all,
    "lora_small": lora_small,
    "lora_qv": lora_qv,
    "light_peft": light_peft,
    "random_masks": random_masks,
}


def _roles(model: Any) -> Roles:
    """Every linear layer of a block as its own module, as far as the model has it."""
    present = {site.role for site in find_sites(model)}
    return tuple(group for group in LORA_ALL_ROLES if set(group) <= present)


def _elsewhere(bench: Bench, net: Any) -> dict[str, Any]:
    """The metric on other rows than those of the task."""
    engine, found = bench.engine, {}
    for name, file in bench.also.items():
        rows = load_rows(file, like=engine.plan.splits, offline=True)
        rows = rows.select(range(min(len(rows), bench.settings["also_rows"])))
        found[name] = engine.phases.evaluate(net, engine.encode(rows).sort("length"))
    return {"also": {n: m[engine.plan.metric] for n, m in found.items()}} if found else {}


def _trained(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    own = {"best_epoch": outcome.best_epoch, "n_params": outcome.n_params}
    return _record(bench, outcome.metrics, outcome) | own


def _record(
    bench: Bench, metrics: Mapping[str, float], cost: Outcome | Watched | None = None
) -> dict[str, Any]:
    engine = bench.engine
    record = {
        "metric": metrics[engine.plan.metric],
        "metrics": dict(metrics),
        "base_params": count_base_params(engine.model),
        "base_params_before": engine.plan.n_base,
        "lr": bench.rate,
    }
    if cost is not None:
        record |= {"train_seconds": cost.seconds, "train_steps": cost.steps}
    return record
