"""Criteria that look at the weights alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.criteria.base import Criterion, Record, unit_means
from prunepeft.errors import ConfigError


@dataclass(frozen=True)
class MinimumWeight(Criterion):
    """Mean squared weight: mean(w^2) over all tensors of the module.

    References:
        PrunePEFT, 2025, arXiv 2506.07587, table of pruning methods. Differs from released code:
        that takes only the module's smallest tensor and divides by the size twice.
    """

    name: ClassVar[str] = "minimum_weight"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def saliency(self, record: Record) -> Tensor:
        return unit_means((w.double().square() for w in unit) for unit in record.weights)


@dataclass(frozen=True)
class Zeros(Criterion):
    """Share of weights that are not exactly zero: 1 - mean(w == 0).

    Ties are common: modules that start at zero stay there only if their gradient vanishes.

    References:
        PrunePEFT, 2025, arXiv 2506.07587, table of pruning methods. Differs from released code:
        that counts the zeros and prunes the largest share; here higher means keep.
    """

    name: ClassVar[str] = "zeros"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def saliency(self, record: Record) -> Tensor:
        return 1 - unit_means((w == 0 for w in unit) for unit in record.weights)


@dataclass(frozen=True)
class Threshold(Criterion):
    """Share of weights that are not tiny: 1 - mean(|w| < limit).

    Attributes:
        limit: Absolute bound t below which a weight counts as absent.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, table of pruning methods. Differs from released code:
        that counts the tiny weights and prunes the largest share; here higher means keep.
    """

    name: ClassVar[str] = "threshold"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    limit: float = 1e-6

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ConfigError(f"threshold.limit must be above zero; got {self.limit!r}.")

    def saliency(self, record: Record) -> Tensor:
        return 1 - unit_means((w.abs() < self.limit for w in unit) for unit in record.weights)


@dataclass(frozen=True)
class ThresholdRelative(Criterion):
    """Share of weights that are not small beside the module's first values.

    1 - mean(|w| <= t) with t = share * RMS of the module's weights before training. A module
    that starts at zero throughout has t = 0, which leaves the share of exact zeros.

    Attributes:
        share: Bound as a share of that RMS.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, method `threshold`. Differs from released code: the
        bound there is 1e-6 for every module, whatever its scale.
    """

    name: ClassVar[str] = "threshold_relative"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    share: float = 0.1

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ConfigError(f"threshold_relative.share must be above zero; got {self.share!r}.")

    def saliency(self, record: Record) -> Tensor:
        limits = (self.share * record.init_rms.double()).tolist()
        pairs = zip(record.weights, limits, strict=True)
        return 1 - unit_means([w.abs() <= t for w in unit] for unit, t in pairs)
