"""Share of the tokens that is padding, in batches of like length, at random, and of fixed width."""

import random
import statistics
from pathlib import Path
from typing import Any

from prunepeft.batches import batch_indices, judged_batches
from prunepeft.config import load_config
from prunepeft.plan import make_plan


def measure(model: str, data: Path, task: str, suite: dict[str, Any]) -> dict[str, Any]:
    """Waste in training over the seeds, and in evaluation, of one task."""
    flags = {"model": model, "data": str(data / task), "budget": "1%"}
    plan = make_plan(load_config(None, (), flags | {"train.max_length": suite["max_length"]}))
    reader = plan.task.load_processor(model)
    lengths = {
        name: list(plan.task.encode(rows, plan.splits, reader, suite["max_length"])["length"])
        for name, rows in (("train", plan.splits.train), ("validation", plan.splits.validation))
    }
    train, batch = lengths["train"], suite["batch"]
    ours, shuffled = [], []
    for seed in suite["seeds"]:
        ours.append(waste(train, batch_indices(train, batch, 1, seed)))
        order = random.Random(seed).sample(range(len(train)), len(train))
        shuffled.append(waste(train, [order[i : i + batch] for i in range(0, len(order), batch)]))
    groups = judged_batches(lengths["validation"], suite["eval_batch"])
    return {
        "rows": len(train),
        "mean_length": statistics.mean(train),
        "ours": statistics.mean(ours),
        "random": statistics.mean(shuffled),
        "fixed": 1 - sum(train) / (len(train) * suite["max_length"]),
        "evaluation": waste(lengths["validation"], groups),
    }


def waste(lengths: list[int], batches: list[list[int]]) -> float:
    """Padding over all tokens of the batches."""
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
