"""Criteria that judge heads and neurons of the frozen base model while modules train on it.

Each gives a number to every output or input feature of a linear layer. The features that a unit
owns are summed by `scoring.Scorer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.kinds import seeded
from prunepeft.registry import Registry, unknown_name
from prunepeft.structured.base_layers import BaseLayer

NEEDS = frozenset({"inputs", "writer_gradients", "weight_gradients"})


@dataclass(frozen=True)
class BaseCriterion(ABC):
    """A way to judge the base model. Hyper-parameters are its fields; it holds no state.

    Class attributes:
        name: Registered name.
        needs: What must be seen in a step, a subset of `NEEDS`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def covers(self, layer: BaseLayer, side: str) -> bool:
        """Whether this criterion has anything to say about this layer."""
        return True

    @abstractmethod
    def features(self, layer: BaseLayer, side: str) -> Tensor:
        """Worth, 0 or more, of every output feature (side "out", (d_out,)) or input feature."""


@dataclass(frozen=True)
class LoraGuided(BaseCriterion):
    """Taylor term with a gradient that is estimated from LoRA alone; W needs no gradient.

    G = gB A + B gA - eta gB gA          entry: |G * (W + s B A)|, or its square

    G is the change of B A in a gradient step of size 1 on A and B when eta = 1. It is summed in
    blocks of rows and never held as a whole. Layers without LoRA have no say.

    Attributes:
        squared: Squares as in the paper; absolute values as in the released code when False.
        eta: Factor of the cross term. It alone is quadratic in the gradient: with 0 the ranking
            does not depend on the scale of the loss, the batch or clipping; 1 is the paper.
        scaled: Whether the weight that G multiplies is W + s B A, which the model computes with
            (released code); W + B A (paper) when False.
    References:
        LoRAPrune, 2024, arXiv 2305.18403.
    """

    name: ClassVar[str] = "lora"

    squared: bool = False
    eta: float = 0.0
    scaled: bool = True

    def __post_init__(self) -> None:
        _check_switches(self, "squared", "scaled")
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float) or self.eta < 0:
            raise ConfigError(
                f"lora.eta must be a number of 0 or more; got {self.eta!r}. 0 is independent of "
                "the scale of the loss, 1 is the paper."
            )

    def covers(self, layer: BaseLayer, side: str) -> bool:
        return layer.branch is not None

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        a, b, ga, gb = layer.lora()
        left, right = torch.cat([gb, b], 1), torch.cat([a - self.eta * ga, ga])
        weight = layer.effective_weight(self.scaled)
        return layer.sums(
            side, lambda rows: _size((left[rows] @ right) * weight(rows), self.squared)
        )


@dataclass(frozen=True)
class Taylor(BaseCriterion):
    """Taylor term with the true gradient: |dL/dW * (W + s B A)|, or its square.

    The control for `lora`: it holds a gradient of the size of every judged weight.

    Attributes:
        squared: Squares instead of absolute values.
    References:
        LLM-Pruner, 2023, arXiv 2305.11627, its first-order term over weights.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[frozenset[str]] = frozenset({"weight_gradients"})

    squared: bool = False

    def __post_init__(self) -> None:
        _check_switches(self, "squared")

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        weight, gradient = layer.effective_weight(), layer.weight_gradient()
        return layer.sums(side, lambda rows: _size(gradient(rows) * weight(rows), self.squared))


@dataclass(frozen=True)
class Magnitude(BaseCriterion):
    """Size of the weights: |W + s B A|.

    References:
        LoRAPrune, 2024, arXiv 2305.18403, the baseline of its tables.
    """

    name: ClassVar[str] = "magnitude"

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        weight = layer.effective_weight()
        return layer.sums(side, lambda rows: weight(rows).abs())


@dataclass(frozen=True)
class Wanda(BaseCriterion):
    """Weights times the norm of what they multiply: |W_ij + s (B A)_ij| * ||x_j|| over tokens.

    References:
        Wanda, 2023, arXiv 2306.11695, eq. 1, pooled to structures as in LoRAPrune's tables.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        weight = layer.effective_weight()
        squares = layer.inputs.get("square")
        norm = torch.zeros((), device=layer.weight.device) if squares is None else squares.sqrt()
        return layer.sums(side, lambda rows: weight(rows).abs() * norm)


@dataclass(frozen=True)
class Salience(BaseCriterion):
    """Activation times gradient at the input h of the layer that writes the block's output.

    mean over tokens of |h_j|  *  mean over tokens of |dL/dh_j|

    Both as if no mask were there, so that a fading unit does not look less important than it is.

    References:
        APT, 2024, arXiv 2401.12200. Differs from released code: that takes sums, so that
        longer rows and padding weigh more, and multiplies in the mask.
    """

    name: ClassVar[str] = "salience"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "writer_gradients"})

    def covers(self, layer: BaseLayer, side: str) -> bool:
        return side == "in"

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        seen = layer.inputs
        if not {"absolute", "gradient", "count"} <= seen.keys():
            return torch.zeros(layer.shape[1], device=layer.weight.device)
        tokens = seen["count"].clamp(min=1)
        return (seen["absolute"] / tokens) * (seen["gradient"] / tokens)


@dataclass(frozen=True)
class Random(BaseCriterion):
    """Numbers drawn once for every writer, the same in every step.

    Attributes:
        seed: Seed of the draw.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def covers(self, layer: BaseLayer, side: str) -> bool:
        return side == "in"

    def features(self, layer: BaseLayer, side: str) -> Tensor:
        drawn = torch.rand(layer.shape[1], generator=seeded(self.seed, layer.path))
        return drawn.to(layer.weight.device)


BASE_CRITERIA: Registry[type[BaseCriterion]] = Registry("base criterion", "prunepeft.base_criteria")
for _criterion in (LoraGuided, Taylor, Magnitude, Wanda, Salience, Random):
    BASE_CRITERIA.register(_criterion.name, _criterion)


def make_base_criterion(name: str, options: Mapping[str, Any] | None = None) -> BaseCriterion:
    """The criterion with these options. Raises UnknownNameError for an unknown name or option."""
    cls = BASE_CRITERIA.get(name)
    known = tuple(f.name for f in fields(cls))
    for key in options or {}:
        if key not in known:
            raise UnknownNameError(unknown_name(f"option of criterion {name!r}:", key, known))
    return cls(**dict(options or {}))


def _size(values: Tensor, squared: bool) -> Tensor:
    return values.square() if squared else values.abs()


def _check_switches(criterion: BaseCriterion, *names: str) -> None:
    for name in names:
        value = getattr(criterion, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{criterion.name}.{name} must be true or false; got {value!r}.")
