"""A training that is saved after each epoch and goes on from there."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from prunepeft.errors import CheckpointError
from prunepeft.sparse_tuning import SparseTuning
from prunepeft.state import read_tensors
from prunepeft.supernet import load_trainable_state, trainable_state
from prunepeft.training.phases import PhaseLog
from prunepeft.training.train_state import load_train_state, save_train_state

logger = logging.getLogger(__name__)


class Resumable:
    """Weights, optimiser, schedule, learning curve and best epoch of a training under way.

    Args:
        net: The model in training.
        optimizer, scheduler: Of this training.
        file: Where it is saved.
        metric: What decides which epoch is best.
        greater_is_better: Direction of the metric.
        tuning: What chooses the layers that train, if not all do.
    """

    def __init__(
        self,
        net: PeftModel,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        file: Path,
        metric: str,
        greater_is_better: bool,
        tuning: SparseTuning | None = None,
    ) -> None:
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.file, self.tuning = file, tuning
        self.metric = metric
        self.sign = 1 if greater_is_better else -1
        self.curve: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_metrics: dict[str, float] = {}
        self.best: dict[str, Tensor] = {}
        self.cost: dict[str, Any] = {"seconds": 0.0, "steps": 0, "peak_memory_bytes": 0}

    def after_epoch(self, epoch: int, log: PhaseLog, metrics: dict[str, float]) -> dict[str, float]:
        """Take an epoch into the record; returns its entry of the curve."""
        scores = {k: v for k, v in metrics.items() if k != "loss"}
        entry = {
            "epoch": epoch,
            "train_loss": log.loss,
            "validation_loss": metrics.get("loss", 0.0),
        }
        self.curve.append(entry | scores)
        self.cost["seconds"] += log.seconds
        self.cost["steps"] += log.steps
        self.cost["peak_memory_bytes"] = max(self.cost["peak_memory_bytes"], log.peak_memory_bytes)
        best = self.best_metrics.get(self.metric)
        if best is None or self.sign * scores[self.metric] > self.sign * best:
            self.best_epoch, self.best_metrics = epoch, scores
            self.best = trainable_state(self.net)
        return self.curve[-1]

    def save(self, epoch: int) -> None:
        """Keep everything that going on needs, in one file."""
        tensors = {f"now.{n}": t for n, t in trainable_state(self.net).items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        extra = {
            "curve": self.curve,
            "best_epoch": self.best_epoch,
            "best_metrics": self.best_metrics,
            "cost": self.cost,
        }
        if self.tuning is not None:
            extra["ist"] = self.tuning.state_dict()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_train_state(
            self.file,
            tensors=tensors,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            step=self.cost["steps"],
            epoch=epoch,
            extra=extra,
        )

    def load(self) -> int:
        """Go back to the last finished epoch and return its number; 0 when there is none.

        A damaged file counts as none: the training starts again, with a warning.
        """
        if not self.file.exists():
            return 0
        try:
            read_tensors(self.file, sealed=True)
        except CheckpointError as error:
            logger.warning("the training starts again because its state is damaged: %s", error)
            return 0
        saved = load_train_state(self.file, optimizer=self.optimizer, scheduler=self.scheduler)
        now = {n[4:]: t for n, t in saved.tensors.items() if n.startswith("now.")}
        load_trainable_state(self.net, now)
        self.best = {n[5:]: t for n, t in saved.tensors.items() if n.startswith("best.")}
        self.curve = saved.extra["curve"]
        self.best_epoch = saved.extra["best_epoch"]
        self.best_metrics = saved.extra["best_metrics"]
        self.cost = saved.extra["cost"]
        if self.tuning is not None:
            self.tuning.load_state_dict(saved.extra["ist"])
        logger.info("training goes on after epoch %d", saved.epoch)
        return saved.epoch

    def clear(self) -> None:
        """Remove the file once the result is kept elsewhere."""
        self.file.unlink(missing_ok=True)
