"""What a planned run would do and cost, told by `check` before weights are read."""

import math
from pathlib import Path
from typing import Any

from prunepeft.batches import n_steps
from prunepeft.config import RunConfig
from prunepeft.data import Splits
from prunepeft.kinds import cost, count_params
from prunepeft.plan import Plan, check_device, problem_of
from prunepeft.processes import n_processes
from prunepeft.quantized import BYTES
from prunepeft.space import Placement, SearchSpace
from prunepeft.state import disk_free
from prunepeft.strategies import Allocator, HybridPruning
from prunepeft.strategies.black_box import BlackBox
from prunepeft.structured.cut import n_removed


def describe(plan: Plan) -> dict[str, Any]:
    """What would run and what it would cost, as plain data."""
    config, splits = plan.config, plan.splits
    placement = plan.given or (plan.space.full() if plan.space else Placement())
    supernet = count_params(placement)
    trained = supernet + sum(plan.head.values())
    train_steps = n_steps(len(splits.train), config.train.batch_size) * config.train.epochs
    by_kind = {k: [s for s in placement if s.kind == k] for k in placement.kinds}
    info = {
        "model": _model(plan),
        "task": {"name": plan.task.name, "metric": plan.metric},
        "data": _data(splits),
        "head": plan.head,
        "budget": {
            "text": str(plan.budget) if plan.budget else None,
            "unit": plan.budget.unit if plan.budget else None,
            "limit": plan.limit,
        },
        "candidates": {
            "modules": len(placement),
            "n_params": supernet,
            "kinds": {
                k: {"modules": len(slots), "sizes": sorted({n for s in slots for n in s.sizes})}
                for k, slots in by_kind.items()
            },
        },
        "search": _search_cost(plan),
        "warnings": _warnings(plan),
        "train": {"steps": train_steps, "epochs": config.train.epochs},
        "memory_bytes": estimate_memory(plan, trained),
    }
    if plan.groups:
        info["base"] = _base(plan)
        if plan.budget is None and plan.given is None:
            del info["train"], info["search"], info["candidates"]
    return info | _disk(plan, supernet)


def _disk(plan: Plan, supernet: int) -> dict[str, Any]:
    """What the run folder takes, what is kept beside it until the process ends, what is free."""
    n_bytes = estimate_disk(plan.config, plan.limit, supernet, sum(plan.head.values()))
    if plan.groups:
        n_bytes += plan.n_base * _width(plan)
    output = Path(plan.config.output or ".").absolute()
    free = disk_free(next(p for p in (output, *output.parents) if p.exists()))
    return {
        "disk_bytes": n_bytes,
        "scratch_bytes_at_most": min(estimate_scratch(plan), free // 2),
        "disk_free_bytes": free,
    }


def _model(plan: Plan) -> dict[str, Any]:
    found = {"name": plan.config.model, "family": plan.family, "n_params": plan.n_base}
    return found | ({"weights": plan.storage.in_words} if plan.storage else {})


def _width(plan: Plan) -> int:
    """Bytes of a number of the base model."""
    return 2 if plan.uses_bf16(check_device(plan.config.device)) else 4


def _base(plan: Plan) -> dict[str, Any]:
    """What would go of each layer of the base model, and the steps to find out."""
    config = plan.config
    ratios = plan.base_ratios if config.base_ratio else plan.strategy.ratios(plan.groups)
    found: dict[str, Any] = {}
    for group in plan.groups:
        n = n_removed(ratios.get(group.what, 0.0), group.n_units) * group.heads_per_unit
        found.setdefault(group.what, f"{n} of {group.n_units * group.heads_per_unit}")
    if not plan.strategy.cuts_base:
        found["steps"] = shrinking_steps(plan)
    return found


def shrinking_steps(plan: Plan) -> int:
    """Optimiser steps of finding out what goes of the base model before the search."""
    config = plan.config
    if not plan.groups or plan.strategy.cuts_base:
        return 0
    n = len(plan.splits.train)
    rows = min(n, max(round(config.base.fidelity * n), plan.splits.n_classes))
    return config.base.epochs * n_steps(rows, config.train.batch_size)


def _data(splits: Splits) -> dict[str, Any]:
    return {
        "source": splits.source,
        "train": len(splits.train),
        "validation": len(splits.validation),
        "columns": splits.columns,
        "labels": list(splits.labels) if splits.labels else None,
        "notes": list(splits.notes),
    }


def _warnings(plan: Plan) -> list[str]:
    """What may surprise; nothing that stops the run."""
    if (
        plan.given is not None
        or plan.budget is None
        or plan.strategy.cuts_base
        or isinstance(plan.strategy, Allocator)
        or cost(_candidates(plan).full(), plan.budget.unit) > plan.limit
    ):
        return []
    return [
        "All candidates fit the budget, so nothing is searched; give larger sizes, more kinds or a "
        "smaller budget to have a choice."
    ]


def planned_steps(plan: Plan) -> int:
    """Optimiser steps that the search takes at most."""
    return _search_cost(plan)["steps"]


def _candidates(plan: Plan) -> SearchSpace:
    """The space that is searched; some methods add sizes."""
    if isinstance(plan.strategy, BlackBox):
        return plan.strategy.candidates(problem_of(plan, None, None))
    return plan.space


def _search_cost(plan: Plan) -> dict[str, Any]:
    """Upper bounds: how many runs, steps and rows the search takes."""
    if isinstance(plan.strategy, BlackBox) and plan.given is None and plan.budget is not None:
        return _trials_cost(plan, plan.strategy)
    if isinstance(plan.strategy, Allocator) and plan.given is None and plan.budget is not None:
        return _look_cost(plan, plan.strategy)
    search, batch, n = plan.config.search, plan.config.train.batch_size, len(plan.splits.train)
    mode = getattr(plan.strategy, "mode", "")
    if plan.given is not None or plan.budget is None or mode in ("none", "random"):
        return {"runs": 0, "steps": 0, "rows_per_training_row": 0.0}
    problem = problem_of(plan, None, None)
    rows = problem.rows(problem.fidelity)
    rounds = getattr(plan.strategy, "rounds", 1)  # a method without rounds trains once
    if isinstance(plan.strategy, HybridPruning):
        rounds = plan.strategy.most_rounds(len(plan.space))
    runs, steps = rounds, rounds * search.epochs * n_steps(rows, batch)
    seen = rounds * search.epochs * rows
    if getattr(plan.strategy, "warmup", False) and mode == "hybrid" and not plan.config.strategy:
        warm_up = plan.strategy.warm_up
        turns = warm_up.n_turns(problem)
        runs += warm_up.most_runs(turns)
        steps += warm_up.steps(problem, turns)
        seen += warm_up.most_runs(turns) * warm_up.epochs * warm_up.n_rows(problem)
    whole = n * plan.config.train.epochs
    return {"runs": runs, "steps": steps, "rows_per_training_row": round(seen / whole, 3)}


def _trials_cost(plan: Plan, strategy: BlackBox) -> dict[str, Any]:
    """The same for methods that try one placement after another."""
    problem = strategy.widened(problem_of(plan, None, None))
    stages = () if problem.cost(problem.space.full()) <= plan.limit else strategy.stages(problem)
    steps = sum(n * problem.n_steps(fidelity) for n, fidelity in stages)
    seen = sum(n * problem.rows(fidelity) * fidelity.epochs for n, fidelity in stages)
    runs, share = sum(n for n, _ in stages), 1.0
    if strategy.max_steps is not None and steps > strategy.max_steps:
        share = strategy.max_steps / steps
        runs, steps = int(runs * share), strategy.max_steps
    whole = problem.n_train * plan.config.train.epochs
    return {"runs": runs, "steps": steps, "rows_per_training_row": round(share * seen / whole, 3)}


def _look_cost(plan: Plan, strategy: Allocator) -> dict[str, Any]:
    """The same for methods that look at the base model once."""
    problem = problem_of(plan, None, None)
    fidelity = strategy.fidelity(problem)
    passes, rows = strategy.passes(fidelity.epochs), problem.rows(fidelity)
    steps = passes * n_steps(rows, problem.batch_size)
    whole = problem.n_train * plan.config.train.epochs
    seen = round(passes * rows / whole, 3)
    return {"runs": 1, "steps": steps, "rows_per_training_row": seen}


def estimate_memory(plan: Plan, trained: int) -> int:
    """Peak bytes of training: weights, what is trained with Adam (16 bytes each), activations."""
    config, sites = plan.config, plan.sites
    width = _width(plan)
    layers = len({(s.stack, s.layer) for s in sites})
    hidden = _hidden(plan)
    wide = sum(s.d_out for s in sites if s.role != "norm")
    rows = math.ceil(config.train.batch_size / config.train.gradient_accumulation)
    per_token = (2 * wide + 8 * hidden * layers) * width
    if config.train.gradient_checkpointing:
        per_token //= max(1, layers)
    held = _held_bytes(plan, layers, width)
    return held + trained * 16 + rows * plan.n_tokens * per_token


def estimate_scratch(plan: Plan) -> int:
    """Bytes at most of the output of frozen layers, which is kept while a process trains."""
    train, splits = plan.config.train, plan.splits
    if train.packing:
        return 0
    tokens = (len(splits.train) + len(splits.validation)) * plan.n_tokens
    stacks = len({s.stack for s in plan.sites})
    most = tokens * stacks * _hidden(plan) * _width(plan)
    return min(round(train.prefix_cache_gb * 1e9), most)


def _hidden(plan: Plan) -> int:
    return max((s.d_out for s in plan.sites if s.role in ("o", "down", "other")), default=0)


def _held_bytes(plan: Plan, layers: int, width: int) -> int:
    """Bytes of the base model that a process holds while it trains.

    Of one that is cut: its part, what is outside the layers, and a layer thrice, as it is gathered,
    as it runs, and as the next one comes. Of a quantised one: the largest layer in plain numbers,
    too.
    """
    sizes = {s.path: s.d_in * s.d_out for s in plan.sites if s.role != "norm"}
    inside = min(plan.n_base, sum(sizes.values()))
    if plan.config.shard:
        most = plan.n_base / n_processes() + plan.n_base - inside + 3 * inside / max(1, layers)
        return round(min(most, plan.n_base + 2 * inside / max(1, layers)) * width)
    bits = plan.storage and plan.storage.bits
    if bits not in BYTES:
        return plan.n_base * width
    plain = plan.n_base - inside + max(sizes.values(), default=0)
    return math.ceil(inside * BYTES[bits]) + plain * width


def estimate_disk(config: RunConfig, limit: int, supernet: int, head: int) -> int:
    """Bytes of the run folder: training state, kept weights, adapter and an export.

    Args:
        config: The settings.
        limit: The budget in parameters; 0 without one.
        supernet: Trainable parameters of all candidates.
        head: Parameters of the task head.
    """
    kept = supernet if config.arch or not limit else min(limit, supernet)
    rounds = config.search.rounds if config.search.reinit == "keep" else 0
    return 4 * ((kept + head) * 8 + (supernet + head) * rounds) + 5_000_000
