"""What is known of the modules after a training pass (Record) and what judges them (Criterion)."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.errors import ConfigError, StateError
from prunepeft.registry import Registry

logger = logging.getLogger(__name__)

RECORDED = frozenset({"weights", "gradients", "outputs"})  # by looking on alone
NEEDS = RECORDED | {"suppression"}
_EMPTY = torch.empty(0)


@dataclass(frozen=True, eq=False)
class Record:
    """Statistics of N units over the optimiser steps of one training pass, on the CPU.

    What was not recorded is empty.

    Attributes:
        units: Ids of the N units (slots).
        weights: Tensors of each unit at the end of the pass, float32, counted from their neutral
            values: the l of ia3, which changes nothing at 1, as l - 1.
        grad_sum: Signed sum over the steps of the gradient of each of those tensors, float32.
        abs_grad_mean: Mean of |g| over steps and weights, (N,).
        abs_weight_grad_mean: Mean of |w * g| over steps and weights, (N,).
        output_abs_mean: Mean of |output| over the sampled forward passes, (N,).
        init_rms: Root mean square of the unit's weights before the first step, (N,).
        layer_importance: Of the unit's layer, in (0, 1), 0.5 where nothing is known, (N,).
        steps: Optimiser steps, at least one.
    Raises:
        StateError: if there was no step, or if a field does not describe all units.
    """

    units: tuple[str, ...]
    weights: tuple[tuple[Tensor, ...], ...] = ()
    grad_sum: tuple[tuple[Tensor, ...], ...] = ()
    abs_grad_mean: Tensor = _EMPTY
    abs_weight_grad_mean: Tensor = _EMPTY
    output_abs_mean: Tensor = _EMPTY
    init_rms: Tensor = _EMPTY
    layer_importance: Tensor = _EMPTY
    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise StateError(
                f"the record of {len(self.units)} modules holds {self.steps} optimiser steps, at "
                "least 1 is needed; use more rows or epochs, or a smaller batch."
            )
        for name in (f.name for f in fields(self) if f.name not in ("units", "steps")):
            if len(getattr(self, name)) not in (0, len(self.units)):
                raise StateError(
                    f"record.{name} describes {len(getattr(self, name))} modules, there are "
                    f"{len(self.units)}; give one entry per module or leave it empty."
                )

    @property
    def holds(self) -> frozenset[str]:
        """Which of `NEEDS` were recorded."""
        found = {
            "weights": self.weights,
            "gradients": self.grad_sum,
            "outputs": self.output_abs_mean,
            "suppression": self.layer_importance,
        }
        return frozenset(name for name, value in found.items() if len(value) == len(self.units))


@dataclass(frozen=True)
class Criterion(ABC):
    """A way to judge modules. Hyper-parameters are its fields; it holds no state.

    Class attributes:
        name: Registered name.
        needs: What the record must hold, a subset of `NEEDS`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def saliency(self, record: Record) -> Tensor:
        """Worth of every unit, (N,); higher = more worth keeping. Must not change the record."""

    def score(self, record: Record) -> Tensor:
        """Return the saliency of every unit, checked and finite.

        A score that is not finite tells nothing about the unit, so it never wins: it becomes the
        smallest finite score, or 0 where none is finite, with a warning.

        Args:
            record: Statistics of N units.
        Returns:
            Saliency, (N,), float64 on the CPU; higher = more worth keeping.
        Raises:
            StateError: if the record lacks what the criterion needs.
            ConfigError: if a plug-in returns another shape.
        """
        if missing := sorted(self.needs - record.holds):
            raise StateError(
                f"criterion {self.name!r} needs {', '.join(missing)}, the record holds "
                f"{', '.join(sorted(record.holds)) or 'nothing'}; "
                f"record with needs={sorted(self.needs)}."
            )
        values = self.saliency(record).detach().to("cpu", torch.float64, copy=True)
        if values.shape != (len(record.units),):
            raise ConfigError(
                f"criterion {self.name!r} returned shape {tuple(values.shape)}; "
                f"return one number per unit, ({len(record.units)},)."
            )
        finite = torch.isfinite(values)
        if not finite.all():
            names = [unit for unit, ok in zip(record.units, finite.tolist(), strict=True) if not ok]
            lowest = values[finite].min() if finite.any() else values.new_zeros(())
            values = torch.where(finite, values, lowest)
            logger.warning(
                "criterion %s is not finite for %s; treated as least worth keeping (%g)",
                self.name,
                ", ".join(names),
                lowest.item(),
            )
        return values


CRITERIA: Registry[Criterion] = Registry("criterion", "prunepeft.criteria")


def unit_means(units: Iterable[Iterable[Tensor]]) -> Tensor:
    """Mean over all elements of each unit's tensors, (N,), summed in float64.

    Example:
        >>> unit_means([[torch.ones(2), torch.zeros(2)], [torch.full((3,), 2.0)]]).tolist()
        [0.5, 2.0]
    """
    means = []
    for tensors in units:
        parts = [(float(t.sum(dtype=torch.float64)), t.numel()) for t in tensors]
        count = sum(n for _, n in parts)
        means.append(math.fsum(s for s, _ in parts) / count if count else 0.0)
    return torch.tensor(means, dtype=torch.float64)


def needs_of(names: Iterable[str]) -> frozenset[str]:
    """What a record must hold for all these criteria."""
    return frozenset().union(*(CRITERIA.get(name).needs for name in names))


def score_units(record: Record, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Saliency by criterion name, then unit id."""
    scores = {name: CRITERIA.get(name).score(record).tolist() for name in names}
    return {name: dict(zip(record.units, values, strict=True)) for name, values in scores.items()}
