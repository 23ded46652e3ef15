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
    rank_gates: ClassVar[tuple[str, ...]] = ("A",)
    in_axes: ClassVar[Mapping[str, int]] = {"A": 1}
    out_axes: ClassVar[Mapping[str, int]] = {"B": 0, "magnitude": 0}
    reads_weight: ClassVar[bool] = True
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
        norm = host.frozen_row_norm().float().cpu().clone()
        return {"A": a, "B": torch.zeros(shapes["B"]), "magnitude": norm}

    def neutral(self, name: str, host: Host) -> Tensor | float:
        return host.frozen_row_norm() if name == "magnitude" else 0.0

    def scaling(self, max_size: int) -> float:
        alpha = 2 * max_size if self.alpha is None else self.alpha
        return alpha / (math.sqrt(max_size) if self.rslora else max_size)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        x = F.dropout(x, self.dropout, host.training)
        low_rank = F.linear(F.linear(x, params["A"]), params["B"])  # (..., d_out)
        with torch.no_grad():
            norm = direction_norm(host, params, scaling)
        factor = params["magnitude"] / norm
        return (factor - 1) * host.frozen_linear(x) + factor * scaling * low_rank

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        """Weight c (W + s B A); `weight` must be the frozen one, before other kinds are merged."""
        direction = weight + scaling * (params["B"] @ params["A"])
        factor = params["magnitude"] / _at_least_tiny(torch.linalg.norm(direction, dim=1))
        return factor[:, None] * direction, bias

    def cut(
        self,
        params: Params,
        site: Site,
        rows: Tensor | None,
        cols: Tensor | None,
        scaling: float,
        host: Host,
    ) -> dict[str, Tensor] | None:
        """Cut tensors; m shrinks with the row norms of V = W + s B A, so that c stays."""
        cut = super().cut(params, site, rows, cols, scaling, host)
        if cut is not None and cols is not None:
            wide = torch.promote_types(params["B"].dtype, torch.float32)
            a, b = params["A"].detach().to(wide), params["B"].detach().to(wide)
            direction = host.frozen_weight().to(wide) + scaling * (b @ a)
            direction = direction if rows is None else direction[rows.to(b.device)]
            before = _at_least_tiny(torch.linalg.norm(direction, dim=1))
            after = torch.linalg.norm(direction[:, cols.to(b.device)], dim=1)
            cut["magnitude"] = cut["magnitude"] * (after / before)
        return cut


def direction_norm(host: Host, params: Params, scaling: float) -> Tensor:
    """Return the row norms of V = W + s B A, (d_out,), without building V.

    |v|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row v of V, w of W and b of B.
    """
    a, b = params["A"], params["B"]
    with torch.autocast(a.device.type, enabled=False):
        cross = (host.frozen_weight().to(a.dtype) @ a.T * b).sum(1)
        own = (b @ (a @ a.T) * b).sum(1)
        square = host.frozen_row_norm().to(a.dtype).square() + 2 * scaling * cross
        return _at_least_tiny((square + scaling**2 * own).clamp_min(0).sqrt())


def _at_least_tiny(norm: Tensor) -> Tensor:
    """Keep an all-zero row (a padded output) finite: its magnitude starts at zero too."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
