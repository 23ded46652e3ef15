"""What the serial and the parallel adapter share: a two-layer network through a narrow middle."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.kinds.base import Host, Kind, Params, check_range
from prunepeft.registry import unknown_name
from prunepeft.space import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
STARTS = ("zero", "paper")


@dataclass(frozen=True)
class Bottleneck(Kind):
    """f(h) = s * (up(act(down(dropout(h)) + down_bias)) + up_bias), D -> R -> D.

    down is (R, D), up is (D, R); D is the width of the residual stream, the site's d_out. A unit of
    the bottleneck is a row of down, its bias and a column of up.

    Attributes:
        activation: `relu`, `gelu`, `silu` or `tanh`.
        dropout: Probability on the module's input while training.
        scale: The factor s.
        init_weights: `zero` starts up at zero, so that a fresh module changes nothing; `paper`
            draws it from N(0, std 1/sqrt(R)). In both, down is drawn from N(0, std 1/sqrt(D)) and
            the biases are zero.
    """

    shrink_axes: ClassVar[Mapping[str, int]] = {"down": 0, "down_bias": 0, "up": 1}
    rank_gates: ClassVar[tuple[str, ...]] = ("up",)
    in_axes: ClassVar[Mapping[str, int]] = {}
    formula: ClassVar[str] = "2 R d_out + R + d_out"

    activation: str = "relu"
    dropout: float = 0.0
    scale: float = 1.0
    init_weights: str = "zero"

    def __post_init__(self) -> None:
        check_range(self.name, "dropout", self.dropout, 0.0, 0.99)
        check_range(self.name, "scale", self.scale, 1e-6, 1e6)
        if self.activation not in ACTIVATIONS:
            known = tuple(ACTIVATIONS)
            raise UnknownNameError(unknown_name(f"{self.name}.activation", self.activation, known))
        if self.init_weights not in STARTS:
            raise ConfigError(
                f"{self.name}.init_weights must be one of {', '.join(STARTS)}; "
                f"got {self.init_weights!r}."
            )

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {
            "down": (size, site.d_out),
            "down_bias": (size,),
            "up": (site.d_out, size),
            "up_bias": (site.d_out,),
        }

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        values["down"].normal_(0, 1 / math.sqrt(shapes["down"][1]), generator=generator)
        if self.init_weights == "paper":
            values["up"].normal_(0, 1 / math.sqrt(shapes["up"][1]), generator=generator)
        return values

    def scaling(self, max_size: int) -> float:
        return self.scale

    def transform(self, params: Params, h: Tensor, scaling: float, training: bool) -> Tensor:
        """Send hidden states (..., D) through the bottleneck; returns (..., D)."""
        h = F.dropout(h, self.dropout, training)
        h = F.linear(h, params["down"], params["down_bias"])  # (..., R)
        h = ACTIVATIONS[self.activation](h)
        return F.linear(h, params["up"], params["up_bias"]) * scaling
