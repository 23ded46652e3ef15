"""The criterion that looks at what modules add in the forward pass."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.criteria.base import Criterion, Record


@dataclass(frozen=True)
class Activation(Criterion):
    """Size of the module's contribution: mean(|output|) over the sampled forward passes.

    References:
        PrunePEFT, 2025, arXiv 2506.07587, table of pruning methods. Differs from released code:
        that reads the first sample of the last batch only and never resets its sum between
        modules.
    """

    name: ClassVar[str] = "activation"
    needs: ClassVar[frozenset[str]] = frozenset({"outputs"})

    def saliency(self, record: Record) -> Tensor:
        return record.output_abs_mean
