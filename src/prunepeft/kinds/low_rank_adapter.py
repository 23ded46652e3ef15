"""Low-rank adapter: a narrow bottleneck whose two projections are low-rank products themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.errors import UnknownNameError
from prunepeft.kinds.base import Host, Kind, Params, check_range, check_whole
from prunepeft.kinds.bottleneck import ACTIVATIONS
from prunepeft.registry import unknown_name
from prunepeft.space import Site


@dataclass(frozen=True)
class LowRankAdapter(Kind):
    """y <- y + s * (U2 V2 act(U1 V1 y + down_bias) + up_bias), through m = d / reduction features.

    V1 (down_in) is (R, d), U1 (down_out) (m, R), V2 (up_in) (R, m), U2 (up_out) (d, R), with R the
    size and d the site's d_out. U2 and the biases start at zero, so a fresh module changes nothing;
    the other factors are drawn Xavier-normally with gain sqrt(2).

    Attributes:
        reduction: Width of the layer over the width m of the middle (at least 1).
        activation: `gelu`, `relu`, `silu` or `tanh`.
        dropout: Probability on the module's input while training.
        scale: The factor s.
    References:
        A candidate of S3Delta, 2022, arXiv 2206.07382, and of BIPEFT, 2024, arXiv 2410.09079, both
        at reduction 32. Differs from released code: one of its options starts both factors of a
        product at zero, which then never train.
    """

    name: ClassVar[str] = "low_rank_adapter"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("o",), ("down",))
    shrink_axes: ClassVar[Mapping[str, int]] = {
        "down_in": 0,
        "down_out": 1,
        "up_in": 0,
        "up_out": 1,
    }
    rank_gates: ClassVar[tuple[str, ...]] = ("down_in", "up_in")
    in_axes: ClassVar[Mapping[str, int]] = {}
    formula: ClassVar[str] = "2 R (d_out + m) + m + d_out"

    reduction: int = 32
    activation: str = "gelu"
    dropout: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self.name, "reduction", self.reduction, 1, 65_536)
        check_range(self.name, "dropout", self.dropout, 0.0, 0.99)
        check_range(self.name, "scale", self.scale, 1e-6, 1e6)
        if self.activation not in ACTIVATIONS:
            known = tuple(ACTIVATIONS)
            raise UnknownNameError(unknown_name(f"{self.name}.activation", self.activation, known))

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("output",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        width = site.d_out
        middle = max(1, width // self.reduction)
        return {
            "down_in": (size, width),
            "down_out": (middle, size),
            "down_bias": (middle,),
            "up_in": (size, middle),
            "up_out": (width, size),
            "up_bias": (width,),
        }

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name in ("down_in", "down_out", "up_in"):
            deviation = math.sqrt(2) * math.sqrt(2 / sum(shapes[name]))
            values[name].normal_(0, deviation, generator=generator)
        return values

    def scaling(self, max_size: int) -> float:
        return self.scale

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        h = F.linear(F.dropout(y, self.dropout, host.training), params["down_in"])  # (..., R)
        h = F.linear(h, params["down_out"], params["down_bias"])  # (..., m)
        h = F.linear(ACTIVATIONS[self.activation](h), params["up_in"])  # (..., R)
        return F.linear(h, params["up_out"], params["up_bias"]) * scaling
