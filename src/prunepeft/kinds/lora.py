"""LoRA: a low-rank update beside a linear layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.kinds.base import Host, Kind, Params, check_range
from prunepeft.space import Site


@dataclass(frozen=True)
class Lora(Kind):
    """Low-rank adaptation: y <- y + s * B(A(dropout(x))).

    A is (R, d_in), B is (d_out, R); B starts at zero, so a fresh module changes nothing.
    s = alpha / R of the slot's largest size, or alpha / sqrt(R) with `rslora`.

    Attributes:
        alpha: Numerator of the scaling; None: twice the largest size.
        dropout: Probability on the module's input while training.
        rslora: Rank-stabilised scaling.
    References:
        LoRA, 2021, arXiv 2106.09685, eq. 3. rsLoRA, 2023, arXiv 2312.03732.
    """

    name: ClassVar[str] = "lora"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q", "v"),
        ("k",),
        ("o",),
        ("up", "gate"),
        ("down",),
    )
    mergeable: ClassVar[bool] = True
    servable: ClassVar[bool] = True
    shrink_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    rank_gates: ClassVar[tuple[str, ...]] = ("A",)
    in_axes: ClassVar[Mapping[str, int]] = {"A": 1}
    out_axes: ClassVar[Mapping[str, int]] = {"B": 0}
    formula: ClassVar[str] = "R (d_in + d_out)"

    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_range(self.name, "alpha", self.alpha, 1e-6, 1e6)
        check_range(self.name, "dropout", self.dropout, 0.0, 0.99)
        if not isinstance(self.rslora, bool):
            raise ConfigError(f"{self.name}.rslora must be true or false; got {self.rslora!r}.")

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("add",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"A": (size, site.d_in), "B": (site.d_out, size)}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(shapes["A"][1])
        a = torch.empty(shapes["A"]).uniform_(-bound, bound, generator=generator)
        return {"A": a, "B": torch.zeros(shapes["B"])}

    def scaling(self, max_size: int) -> float:
        alpha = 2 * max_size if self.alpha is None else self.alpha
        return alpha / (math.sqrt(max_size) if self.rslora else max_size)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        h = F.linear(F.dropout(x, self.dropout, host.training), params["A"])  # (..., R)
        return F.linear(h * scaling, params["B"])

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        return weight + scaling * (params["B"] @ params["A"]), bias
