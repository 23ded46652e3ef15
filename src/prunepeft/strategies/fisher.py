"""Ranks in proportion to the empirical Fisher information of the frozen weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prunepeft.space import Slot
from prunepeft.strategies.allocator import BatchAllocator
from prunepeft.strategies.base import Problem
from prunepeft.strategies.frozen_gradients import FrozenGradients


@dataclass(frozen=True)
class Fisher(BatchAllocator):
    """Ranks in proportion to the mean squared gradient of each frozen weight, over some batches.

    Attributes:
        max_factor: See `Allocator`; 2 if not given.
        batches: See `BatchAllocator`.
        warm_head: See `GoRa`.
    References:
        Proposed for peft in 2026 (pull request 3204, not merged): squared gradients of batches,
        largest remainder, at most twice the uniform rank. Squares are of the gradient of a batch,
        not of a row, so they hold the gradient's mean as well as its spread.
    """

    name: ClassVar[str] = "fisher"
    reads_gradients: ClassVar[bool] = True
    needs_whole_base: ClassVar[bool] = True

    warm_head: bool = True

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> FrozenGradients:
        """See `Allocator.probe`."""
        return FrozenGradients(slots, measure="mean_square", warm_head=self.warm_head)

    def passes(self, epochs: int) -> int:
        """See `Allocator.passes`."""
        return 1 + epochs * self.warm_head
