"""LoRETTA_adp: a serial adapter with both projections as tensor trains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.kinds.base import Host, Params, check_whole
from prunepeft.kinds.bottleneck import ACTIVATIONS
from prunepeft.kinds.serial_adapter import SerialAdapter
from prunepeft.kinds.tensor_train import (
    apply_train,
    bond_axes,
    core_shapes,
    draw_cores,
    train_of,
)
from prunepeft.space import Site


@dataclass(frozen=True)
class LorettaAdp(SerialAdapter):
    """Adapter by tensor trains: y <- y + s * (act(dropout(y) D + down_bias) U + up_bias).

    D is the train of a (d_out, bottleneck) matrix with the cores down0, down1, ..., U that of
    (bottleneck, d_out) with up0, up1, ...; both biases are dense. The size R is the rank of the
    trains, the length of every bond between two cores.

    Attributes:
        activation: `relu`, `gelu`, `silu` or `tanh`.
        dropout: Probability on the module's input while training.
        scale: The factor s.
        init_weights: `zero` starts the last core of U and up_bias at zero, so that a fresh module
            changes nothing; `paper` draws them like the rest: the cores such that each matrix
            (p, q) has variance 1 / (p + q), the biases uniform in +-1/sqrt(their length).
        bottleneck: Width between the two projections.
    References:
        LoRETTA, 2024, arXiv 2402.11417. Differs from released code: that always starts as `paper`,
        has tanh and a bottleneck of 256 as its defaults (its scripts and the paper: relu and 64),
        and on Llama adapts the input of up and gate instead of the output of the attention.
    """

    name: ClassVar[str] = "loretta_adp"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("o",), ("down",))
    max_default_size: ClassVar[int] = 8  # the cores grow with its square
    shrink_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"down": (0, 2), "up": (0, 2)}
    rank_gates: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = "2 TT(d_out, bottleneck) + bottleneck + d_out"

    bottleneck: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "bottleneck", self.bottleneck, 1, 65_536)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {
            **core_shapes("down", site.d_out, self.bottleneck, size),
            "down_bias": (self.bottleneck,),
            **core_shapes("up", self.bottleneck, site.d_out, size),
            "up_bias": (site.d_out,),
        }

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        is_zero = self.init_weights == "zero"
        values = draw_cores(shapes, "down", self.bottleneck, generator)
        values |= draw_cores(shapes, "up", self.bottleneck, generator, zero_last=is_zero)
        for name in ("down_bias", "up_bias"):
            bound = 1 / math.sqrt(shapes[name][0])
            values[name] = torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)
        if is_zero:
            values["up_bias"].zero_()
        return values

    def rank_axes(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return bond_axes(self.shrink_axes, name, tensor)

    def transform(self, params: Params, h: Tensor, scaling: float, training: bool) -> Tensor:
        h = F.dropout(h, self.dropout, training)
        h = apply_train(h, train_of(params, "down")) + params["down_bias"]  # (..., bottleneck)
        h = ACTIVATIONS[self.activation](h)
        return (apply_train(h, train_of(params, "up")) + params["up_bias"]) * scaling
