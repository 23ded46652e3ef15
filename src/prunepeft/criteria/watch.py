"""Scores the modules of a supernet while it trains."""

from typing import Any

from peft import PeftModel
from torch import Tensor

from prunepeft.criteria.base import needs_of, score_units
from prunepeft.criteria.record import Recorder
from prunepeft.criteria.settling import Settling


class SaliencyWatcher:
    """Records what the criteria need; the statistics are those of the last epoch.

    Args:
        criteria: Names of the criteria to score.
        settle: End the last epoch when the rankings have settled, see `Settling`.
        epochs: Of the training.
    """

    def __init__(
        self, criteria: tuple[str, ...], settle: float | None = None, epochs: int = 1
    ) -> None:
        self.criteria, self.settle, self.epochs = criteria, settle, epochs
        self.config: dict[str, Any] = {"criteria": sorted(criteria), "settle": settle}
        self.saliency: dict[str, dict[str, float]] = {}
        self._epoch = 0

    def attach(self, net: PeftModel) -> None:
        self.recorder = Recorder.for_net(net, needs_of(self.criteria))

    def start(self, steps: int) -> None:
        self.recorder.__enter__()
        self._steps = steps // self.epochs

    def mark(self) -> None:
        self._epoch += 1
        self.reset()

    def reset(self) -> None:
        self.recorder.reset()
        is_last = self._epoch == self.epochs
        self._settling = Settling(self.settle if is_last else None, self._steps)

    def step(self) -> bool:
        """See `Watcher.step`."""
        self.recorder.step()
        is_due = self._settling.is_due(self.recorder.steps)
        return is_due and self._settling.add(score_units(self.recorder.read(), self.criteria))

    def stop(self) -> dict[str, Tensor]:
        """Stop recording and score every module."""
        self.recorder.__exit__(None, None, None)
        self.saliency = score_units(self.recorder.read(), self.criteria)
        return {}

    def abandon(self) -> None:
        """Stop recording."""
        self.recorder.__exit__(None, None, None)
