"""A training step of ours against plain peft LoRA in a bare loop, paired in one process.

Three epochs over the same batches: LoRA of peft in a bare loop, our modules in the same loop, and
our modules in a phase as the search and the training run it.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engine.nets import (
    bare_loop,
    lora_placement,
    make_model,
    make_phases,
    make_rows,
    plain_lora,
    union,
)
from prunepeft.batches import batch_indices
from prunepeft.training import make_optimizer, make_scheduler


def measure(
    case: dict[str, Any], rows: int, steps: int, pairs: int, device: str = "cpu"
) -> dict[str, Any]:
    """Seconds a step of the three, and ratios pair by pair."""
    bf16 = case["precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    data = make_rows(rows * steps, case["tokens"])
    batches = batch_indices(data["length"], rows, 1, 0)
    peft = plain_lora(make_model(case["layers"], dtype, device))
    model = make_model(case["layers"], dtype, device)
    ours = union(model, lora_placement(model))
    count = [sum(p.numel() for p in n.parameters() if p.requires_grad) for n in (peft, ours)]
    if count[0] != count[1]:
        raise RuntimeError(f"the two train {count} parameters; they must be the same")
    phases = make_phases(data, rows, bf16, device=device)
    optimizer = make_optimizer(ours, phases.settings, 1e-4)
    scheduler = make_scheduler(optimizer, phases.settings, 10**6)
    epochs = {
        "peft": bare_loop(peft, data, batches, bf16),
        "union": bare_loop(ours, data, batches, bf16),
        "phase": lambda: phases.run(ours, data, optimizer, scheduler, 0),
    }
    times = paired(epochs, pairs, device)
    return {
        "trainable": count[0],
        "seconds": {k: statistics.median(t[k] for t in times) / steps for k in epochs},
        "ratios": {
            f"{a}/{b}": summary([t[a] / t[b] for t in times])
            for a, b in (("union", "peft"), ("phase", "union"), ("phase", "peft"))
        },
    }


def paired(what: dict[str, Callable[[], Any]], pairs: int, device: str) -> list[dict[str, float]]:
    """Seconds of each, so many times, in random order after one for practice."""
    for call in what.values():
        call()
    found = []
    for _ in range(pairs):
        times = {}
        for name in random.sample(list(what), len(what)):
            times[name] = timed(what[name], device)
        found.append(times)
    return found


def timed(call: Callable[[], Any], device: str) -> float:
    """Processor seconds of this process, on a GPU wall seconds until it has finished."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def summary(ratios: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    return {"median": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)}
