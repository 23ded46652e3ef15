"""GoRA: ranks in proportion to how much the loss depends on the frozen weights, |W * G|."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.space import Slot
from prunepeft.strategies.allocation import Rows, by_share, uniform_size
from prunepeft.strategies.allocator import BatchAllocator
from prunepeft.strategies.base import Problem
from prunepeft.strategies.frozen_gradients import FrozenGradients


@dataclass(frozen=True)
class GoRa(BatchAllocator):
    """Gradient-driven ranks; allocation only, the modules start from their usual first values.

    Importance I = mean |W * G|, with G the mean gradient of the batches; ranks are in proportion to
    I / sqrt(d_in + d_out), the sum taken over tied layers.

    Attributes:
        max_factor: See `Allocator`; 4 if not given.
        batches: See `BatchAllocator`.
        min_factor: Smallest rank, in times the rank that all could have alike, rounded down.
        warm_head: Train the task head alone for `search.epochs` before gradients are taken; a new
            head hands random gradients down.
    References:
        GoRA: Gradient-driven Adaptive Low Rank Adaptation, NeurIPS 2025, arXiv 2502.12171. Its
        first values of B (one step of gradient descent) are left out. Differs from released code:
        ranks use the budget up exactly, where it rounds each; the head is trained first.
    """

    name: ClassVar[str] = "gora"
    default_max: ClassVar[float] = 4.0
    reads_gradients: ClassVar[bool] = True
    needs_whole_base: ClassVar[bool] = True

    min_factor: float = 0.5
    warm_head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_factor <= 1:
            raise ConfigError(f"allocate.min_factor must be in [0, 1]; got {self.min_factor!r}.")

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> FrozenGradients:
        """See `Allocator.probe`."""
        return FrozenGradients(slots, measure="weight_times_mean", warm_head=self.warm_head)

    def passes(self, epochs: int) -> int:
        """See `Allocator.passes`."""
        return 1 + epochs * self.warm_head

    def sizes(
        self, slots: Mapping[str, Slot], found: Mapping[str, Tensor], rows: Rows, limit: int
    ) -> dict[str, int]:
        """See `Allocator.sizes`."""
        width = {i: sum(t.d_in + t.d_out for t in s.sites) for i, s in slots.items()}
        weights = {i: float(found[i]) / math.sqrt(width[i]) for i in slots}
        least = math.floor(self.min_factor * uniform_size(rows, limit))
        lowest = {i: min(least, len(row) - 1) for i, row in rows.items()}
        return by_share(weights, rows, limit, lowest)
