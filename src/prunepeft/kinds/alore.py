"""ALoRE: a sum of low-rank experts that live in a Kronecker product space."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.errors import SiteError
from prunepeft.kinds.base import (
    Host,
    Kind,
    Params,
    check_divides,
    check_one_of,
    check_range,
    check_whole,
)
from prunepeft.space import Site

STAGE_OF_POSITION = {"post": "output", "pre": "input", "parallel": "add"}


@dataclass(frozen=True)
class Alore(Kind):
    """Aggregated low-rank experts: h <- h + s * h E, linear, so it merges into the layer.

    With n experts and h as n rows of d / n features, form `expert` has
    E = sum_i S_i kron (U_i V_i), where S_i is (n, n), U_i (d/n, R) and V_i (R, d/n). Form `phm` is
    E = (sum_i S_i kron U_i) (sum_i T_i kron V_i), two layers of a bottleneck of n R features.
    V starts at zero, so a fresh module changes nothing; S and T have a deviation of 1/n, U is drawn
    Xavier-uniformly. E itself is built for merging only.

    Attributes:
        experts: Number n of experts; must divide d.
        form: `expert` or `phm`.
        position: `post` (h is the layer's output with its bias), `pre` (its input), or `parallel`
            (beside it, for layers as wide as they are long).
        scale: The factor s.
    References:
        ALoRE, 2024, arXiv 2412.08341. Its code was not available: the abstract fixes a linear,
        mergeable sum of low-rank experts in Kronecker form; the rest is our reading and an option.
    """

    name: ClassVar[str] = "alore"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("o",), ("down",))
    mergeable: ClassVar[bool] = True
    shrink_axes: ClassVar[Mapping[str, int]] = {"U": 2, "V": 1}
    rank_gates: ClassVar[tuple[str, ...]] = ("U",)
    formula: ClassVar[str] = "n^3 + 2 R d"

    experts: int = 4
    form: str = "expert"
    position: str = "post"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self.name, "experts", self.experts, 1, 256)
        check_range(self.name, "scale", self.scale, 1e-6, 1e6)
        check_one_of(self.name, "form", self.form, ("expert", "phm"))
        check_one_of(self.name, "position", self.position, tuple(STAGE_OF_POSITION))

    def stages(self, site: Site) -> tuple[str, ...]:
        if self.position == "parallel" and site.d_in != site.d_out:
            raise SiteError(
                f"alore.position parallel needs a layer as wide as it is long; {site.path} has "
                f"{site.d_in} inputs and {site.d_out} outputs. Use post or pre, or other roles."
            )
        return (STAGE_OF_POSITION[self.position],)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        width, n = site.d_in if self.position == "pre" else site.d_out, self.experts
        check_divides(self.name, "experts", n, width, site)
        mixes = ("S",) if self.form == "expert" else ("S", "T")
        low_rank = {"U": (n, width // n, size), "V": (n, size, width // n)}
        return dict.fromkeys(mixes, (n, n, n)) | low_rank

    def feature_axes(self, site: Site, side: str) -> Mapping[str, int] | None:
        return {} if self.position == ("post" if side == "in" else "pre") else None

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name in {"S", "T"} & set(shapes):
            values[name].normal_(0, 1 / self.experts, generator=generator)
        bound = math.sqrt(6 / sum(shapes["U"][1:]))
        values["U"].uniform_(-bound, bound, generator=generator)
        return values

    def scaling(self, max_size: int) -> float:
        return self.scale

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return _times_e(x if stage == "add" else y, params) * scaling

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        if stage == "output":
            turned = weight + scaling * _times_e(weight.T, params).T
            return turned, None if bias is None else bias + scaling * _times_e(bias, params)
        width = weight.shape[1]
        e = _times_e(torch.eye(width, dtype=weight.dtype, device=weight.device), params)
        return weight + scaling * (weight @ e.T if stage == "input" else e.T), bias


def _times_e(h: Tensor, params: Params) -> Tensor:
    """Return h E for h of shape (..., d), without building E."""
    n, part, rank = params["U"].shape
    u = params["U"].transpose(0, 1).reshape(part, n * rank)
    p = (h.unflatten(-1, (n, part)) @ u).unflatten(-1, (n, rank))  # (..., a, i, R)
    if "T" in params:
        p = torch.einsum("...air,iaj->...jr", p, params["S"].to(p.dtype))
        p = torch.einsum("...jr,ijk->...kir", p, params["T"].to(p.dtype))
    else:
        p = torch.einsum("...air,iak->...kir", p, params["S"].to(p.dtype))
    return (p.flatten(-2) @ params["V"].reshape(n * rank, part)).flatten(-2)
