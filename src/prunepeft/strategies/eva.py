"""EVA: ranks where few directions explain most of what a layer reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.space import Slot
from prunepeft.strategies.allocation import Rows, by_units
from prunepeft.strategies.allocator import BatchAllocator
from prunepeft.strategies.base import Problem
from prunepeft.strategies.explained_variance import ExplainedVariance


@dataclass(frozen=True)
class Eva(BatchAllocator):
    """Explained variance adaptation; allocation only, modules start from their usual first values.

    The directions of all layers are sorted by the share of the variance of the layer's input that
    they explain. From the top, each gives its module one more rank, if that fits. Forward
    passes only, and no labels.

    Attributes:
        max_factor: See `Allocator`; 2 if not given (rho in the paper).
        batches: See `BatchAllocator`.
        tau: A layer is done when every direction has at least this cosine with itself one batch
            before.
    References:
        EVA, NeurIPS 2025, arXiv 2410.07170; the decomposition is peft's. Differs from peft: it sees
        no more than `batches` (peft goes round until all converge), all directions of a layer must
        converge, ranks count by their cost, and first values of A are left out.
    """

    name: ClassVar[str] = "eva"
    reads_search: ClassVar[frozenset[str]] = frozenset({"fidelity"})

    tau: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"allocate.tau must be in [0, 1]; got {self.tau!r}.")

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> ExplainedVariance:
        """See `Allocator.probe`."""
        return ExplainedVariance(slots, n_directions=self.largest(rank), tau=self.tau)

    def passes(self, epochs: int) -> int:
        """See `Allocator.passes`."""
        return 1

    def importance(self, slot: Slot, found: Tensor) -> float:
        """All that the directions explain."""
        return float(found.sum())

    def sizes(
        self, slots: Mapping[str, Slot], found: Mapping[str, Tensor], rows: Rows, limit: int
    ) -> dict[str, int]:
        """See `Allocator.sizes`."""
        shares = ((v, i) for i in slots for v in found[i].tolist())
        order = [i for _, i in sorted(shares, key=lambda pair: -pair[0])]
        return by_units(order, rows, limit)
