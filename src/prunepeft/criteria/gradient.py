"""Criteria that look at gradients. g is the gradient of one optimiser step, w the weight."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.criteria.base import Criterion, Record, unit_means


@dataclass(frozen=True)
class Snip(Criterion):
    """Connection sensitivity: mean(|w * sum of g over the steps|).

    References:
        SNIP, 2019, arXiv 1810.02340, eq. 6; PrunePEFT, 2025, arXiv 2506.07587, table of pruning
        methods. Differs from released code: that multiplies |g| by the signed weight, so that
        weights of both signs cancel.
    """

    name: ClassVar[str] = "snip"
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gradients"})

    def saliency(self, record: Record) -> Tensor:
        units = zip(record.weights, record.grad_sum, strict=True)
        return unit_means(
            [(w.double() * g.double()).abs() for w, g in zip(*unit, strict=True)] for unit in units
        )


@dataclass(frozen=True)
class Gradient(Criterion):
    """Size of the summed gradient: mean(|sum of g over the steps|).

    References:
        PrunePEFT, 2025, arXiv 2506.07587, table of pruning methods. Differs from released code:
        that prunes the smallest but rewards the largest in its hybrid score; here higher means
        keep everywhere.
    """

    name: ClassVar[str] = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def saliency(self, record: Record) -> Tensor:
        return unit_means((g.abs() for g in unit) for unit in record.grad_sum)


@dataclass(frozen=True)
class SnipMean(Criterion):
    """Mean sensitivity of the steps: mean over steps and weights of |w * g|, w as of that step.

    Gradients of opposite sign in different steps do not cancel, unlike in `snip`.

    References:
        After SNIP, 2019, arXiv 1810.02340, eq. 6. Differs from released code: not in it.
    """

    name: ClassVar[str] = "snip_mean"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def saliency(self, record: Record) -> Tensor:
        return record.abs_weight_grad_mean


@dataclass(frozen=True)
class GradientMean(Criterion):
    """Mean gradient size of the steps: mean over steps and weights of |g|.

    Gradients of opposite sign in different steps do not cancel, unlike in `gradient`.

    References:
        After PrunePEFT, 2025, arXiv 2506.07587. Differs from released code: not in it.
    """

    name: ClassVar[str] = "gradient_mean"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def saliency(self, record: Record) -> Tensor:
        return record.abs_grad_mean
