"""DoRA: a trained magnitude per output times a low-rank change of the direction."""

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
class Dora(Kind):
    """Weight-decomposed adaptation: y <- y + (c - 1) (W x) + c s B(A(x)), c = m / ||W + s B A||.

    A is (R, d_in), B is (d_out, R), the magnitude m and the norm of the rows are (d_out,). B starts
    at zero and m at the row norms of W, so a fresh module changes nothing. The norm is a constant
    for the gradient (section 4.3), the bias is not scaled, and dropout acts on x in both terms.

    Attributes:
        alpha: Numerator of the scaling s = alpha / R of the slot's largest size R; None: 2 R.
        dropout: Probability on the module's input while training.
        rslora: Scaling alpha / sqrt(R) instead.
    References:
        DoRA, 2024, arXiv 2402.09353, eq. 5 and section 4.3.
    """

    name: ClassVar[str] = "dora"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q", "v"),
        ("k",),
        ("o",),
        ("up", "gate"),
        ("down",),
    )
    mergeable: ClassVar[bool] = True
    shrink_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    formula: ClassVar[str] = "R (d_in + d_out) + d_out"

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
        return {"A": (size, site.d_in), "B": (site.d_out, size), "magnitude": (site.d_out,)}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(shapes["A"][1])
        a = torch.empty(shapes["A"]).uniform_(-bound, bound, generator=generator)
        norm = torch.linalg.norm(host.frozen_weight().detach().float(), dim=1)
        return {"A": a, "B": torch.zeros(shapes["B"]), "magnitude": norm.cpu()}

    def scaling(self, max_size: int) -> float:
        alpha = 2 * max_size if self.alpha is None else self.alpha
        return alpha / (math.sqrt(max_size) if self.rslora else max_size)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        x = F.dropout(x, self.dropout, host.training)
        low_rank = F.linear(F.linear(x, params["A"]), params["B"])  # (..., d_out)
        with torch.no_grad():
            weight = host.frozen_weight().to(params["A"].dtype)
            norm = direction_norm(weight, params, scaling)
        factor = params["magnitude"] / norm
        return (factor - 1) * host.frozen_linear(x) + factor * scaling * low_rank

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        """Weight c (W + s B A); `weight` must be the frozen one, before other kinds are merged."""
        factor = params["magnitude"] / direction_norm(weight, params, scaling)
        return factor[:, None] * (weight + scaling * (params["B"] @ params["A"])), bias


def direction_norm(weight: Tensor, params: Params, scaling: float) -> Tensor:
    """Return the row norms of W + s B A, (d_out,), at least the smallest positive number.

    The floor keeps an all-zero row (a padded output) finite: its magnitude starts at zero too.
    """
    norm = torch.linalg.norm(weight + scaling * (params["B"] @ params["A"]), dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
