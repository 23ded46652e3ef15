"""Scores the modules of a supernet while it trains."""

from typing import Any

from peft import PeftModel
from torch import Tensor

from prunepeft.criteria.base import needs_of, score_units
from prunepeft.criteria.record import Recorder


class SaliencyWatcher:
    """Records what the criteria need; the statistics are those of the last epoch.

    Args:
        criteria: Names of the criteria to score.
    """

    def __init__(self, criteria: tuple[str, ...]) -> None:
        self.criteria = criteria
        self.config: dict[str, Any] = {"criteria": sorted(criteria)}
        self.saliency: dict[str, dict[str, float]] = {}

    def attach(self, net: PeftModel) -> None:
        self.recorder = Recorder.for_net(net, needs_of(self.criteria))

    def start(self, steps: int) -> None:
        self.recorder.__enter__()

    def mark(self) -> None:
        self.recorder.reset()

    def reset(self) -> None:
        self.recorder.reset()

    def step(self) -> None:
        self.recorder.step()

    def stop(self) -> dict[str, Tensor]:
        """Stop recording and score every module."""
        self.recorder.__exit__(None, None, None)
        self.saliency = score_units(self.recorder.read(), self.criteria)
        return {}

    def abandon(self) -> None:
        """Stop recording."""
        self.recorder.__exit__(None, None, None)
