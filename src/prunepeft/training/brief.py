"""Short trainings of a search: rows at a fidelity, some epochs, and what they cost."""

import logging
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from prunepeft.batches import derive_seed, n_steps
from prunepeft.budget import Fidelity
from prunepeft.data import subset
from prunepeft.errors import OutOfMemoryError, PrunePeftError, StateError
from prunepeft.evaluate import Target, Watcher
from prunepeft.training.phases import PhaseLog, Phases, make_optimizer, make_scheduler

logger = logging.getLogger(__name__)

MAX_ERROR = 1000  # characters of an error's text that are kept


def rows_at(phases: Phases, target: Target, fidelity: Fidelity, seed: int) -> Dataset:
    """The training rows that are seen; fewer are contained in more of the same seed."""
    if fidelity.data >= 1:
        return phases.train
    n = fidelity.rows(len(phases.train))
    return subset(phases.train, n, seed, "labels" if target.stratify else None)


def train_briefly(
    net: PeftModel,
    phases: Phases,
    target: Target,
    rows: Dataset,
    epochs: int,
    name: str,
    seed: int,
    watcher: Watcher | None = None,
) -> tuple[list[PhaseLog], dict[str, Tensor]]:
    """Train for some epochs, perhaps while a watcher looks on.

    Args:
        net: The model with modules on it.
        phases: How to train.
        target: What to train towards.
        rows: Encoded rows.
        epochs: Passes over them.
        name: For the progress line.
        seed: Order and dropout.
        watcher: Finds something out, or acts.
    Returns:
        One entry an epoch, and what the watcher found.
    """
    steps = n_steps(len(rows), phases.settings.batch_size) * epochs
    phases.progress.start(name, steps)
    logs = []
    if watcher is not None:
        watcher.attach(net)
    try:
        optimizer = make_optimizer(net, phases.settings, target.search_lr)
        scheduler = make_scheduler(optimizer, phases.settings, steps)
        if watcher is not None:
            watcher.start(steps)
        for epoch in range(1, epochs + 1):
            if watcher is not None:
                watcher.mark()
            phase_seed = derive_seed(seed, "epoch", epoch)
            logs.append(phases.run(net, rows, optimizer, scheduler, phase_seed, watcher))
    except BaseException:
        if watcher is not None:
            watcher.abandon()
        raise
    return logs, {} if watcher is None else watcher.stop()


def measure_briefly(
    training: AbstractContextManager[PeftModel],
    phases: Phases,
    target: Target,
    rows: Dataset,
    epochs: int,
    name: str,
    seed: int,
) -> dict[str, Any]:
    """Train and evaluate; what goes wrong because of the placement is told, not raised.

    Args:
        training: Gives the model with modules on it, and is left before an error is judged.
        phases: How to train.
        target: What to train towards.
        rows: Encoded rows.
        epochs: Passes over them.
        name: For the progress line.
        seed: Order and dropout.

    Returns:
        `metrics` or `error`, and the cost; a failed training counts all steps it was to take.
    """
    pieces = phases.pieces, phases.eval_pieces
    began = time.perf_counter()
    try:
        with training as net:
            logs, _ = train_briefly(net, phases, target, rows, epochs, name, seed)
            found = phases.evaluate(net)
        metrics = {k: v for k, v in found.items() if k != "loss"}
        if bad := [k for k, v in metrics.items() if not math.isfinite(v)]:
            raise StateError(f"{bad[0]} became {metrics[bad[0]]}; lower the learning rate.")
    except Exception as error:
        if not _is_of_placement(error) or torch.distributed.is_initialized():
            raise  # where there are several processes, the others would wait for this one
        phases.pieces, phases.eval_pieces = pieces
        logger.warning("%s failed: %s", name, error)
        steps = n_steps(len(rows), phases.settings.batch_size) * epochs
        cost = {"seconds": time.perf_counter() - began, "steps": steps, "rows": len(rows)}
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR], **cost}
    # All of it costs: the states of frozen layers before, measuring after.
    cost = cost_of(logs, rows) | {"seconds": time.perf_counter() - began}
    return {"metrics": metrics, **cost}


def cost_of(logs: list[PhaseLog], rows: Dataset) -> dict[str, Any]:
    """What a training cost, with the loss of its last epoch."""
    return {
        "loss": logs[-1].loss,
        "seconds": sum(log.seconds for log in logs),
        "steps": sum(log.steps for log in logs),
        "rows": len(rows),
        "peak_memory_bytes": max(log.peak_memory_bytes for log in logs),
    }


def _is_of_placement(error: Exception) -> bool:
    """Whether another placement may do better: not for errors in settings, data or on the disk."""
    if isinstance(error, PrunePeftError):
        return isinstance(error, OutOfMemoryError | StateError)
    return not isinstance(error, OSError)
