"""ETHER and ETHER+: the frozen weight times reflections whose directions are trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.kinds.base import Host, Kind, Params, check_divides, check_one_of, check_whole
from prunepeft.space import Site

STAGE_OF_SIDE = {"input": ("input",), "output": ("product",)}
SIDE_OF_STAGE = {"input": "input", "product": "output"}
EPSILON = 1e-12  # keeps a vector of zeros finite


@dataclass(frozen=True)
class Ether(Kind):
    """Householder reflection of the weight: W <- W H or H W, H = blockdiag_i(I - 2 u_i u_i^T).

    u is (blocks, d / blocks), every row scaled to length one; d is d_in on the input side and d_out
    on the output side. The bias is left alone. A reflection is never the identity: a fresh module
    moves an output by about 2 sqrt(blocks / d) of its length.

    Attributes:
        blocks: Diagonal blocks of H; must divide d. The count does not depend on it.
        side: `input` (W H) or `output` (H W).
    References:
        ETHER, 2024, arXiv 2405.20271, section 3. Differs from released code: its blocks of the
        input side mix columns of different blocks when there is more than one; ours are diagonal.
    """

    name: ClassVar[str] = "ether"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("q", "v"),)
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    formula: ClassVar[str] = "d_in (d_out on the output side)"

    blocks: int = 1
    side: str = "input"

    def __post_init__(self) -> None:
        check_whole(self.name, "blocks", self.blocks, 1, 65_536)
        check_one_of(self.name, "side", self.side, tuple(STAGE_OF_SIDE))

    def stages(self, site: Site) -> tuple[str, ...]:
        return STAGE_OF_SIDE[self.side]

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"u": _blocks(self.name, site, self.side, self.blocks)}

    def feature_axes(self, site: Site, side: str) -> Mapping[str, int] | None:
        return None if self.side.startswith(side) else {}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {"u": _direction(shapes["u"], generator)}

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return -2 * _projected(y, params["u"])

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        rows = weight if stage == "input" else weight.T
        turned = rows - 2 * _projected(rows, params["u"])
        return turned if stage == "input" else turned.T, bias


@dataclass(frozen=True)
class EtherPlus(Kind):
    """Relaxed reflections: W <- H2 W H1 with H = blockdiag_i(I - u_i u_i^T + v_i v_i^T).

    Per side u and v are (blocks, d / blocks), every row scaled to length one. v starts at -u, so a
    fresh module changes nothing. The bias is left alone.

    Attributes:
        blocks: Diagonal blocks of H; must divide the width of every side in use.
        sides: `both`, `input` (W H1) or `output` (H2 W).
    References:
        ETHER, 2024, arXiv 2405.20271, section 3.2; two-sided in the paper's experiments. Differs
        from released code as `Ether` does. H is singular where u and v are orthogonal, so unmerging
        brings back the kept weight and inverts nothing.
    """

    name: ClassVar[str] = "ether_plus"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("q", "v"),)
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    formula: ClassVar[str] = "2 (d_in + d_out)"

    blocks: int = 1
    sides: str = "both"

    def __post_init__(self) -> None:
        check_whole(self.name, "blocks", self.blocks, 1, 65_536)
        check_one_of(self.name, "sides", self.sides, ("both", *STAGE_OF_SIDE))

    @property
    def _sides(self) -> tuple[str, ...]:
        return tuple(STAGE_OF_SIDE) if self.sides == "both" else (self.sides,)

    def stages(self, site: Site) -> tuple[str, ...]:
        return tuple(stage for side in self._sides for stage in STAGE_OF_SIDE[side])

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{side}_{vector}": _blocks(self.name, site, side, self.blocks)
            for side in self._sides
            for vector in ("u", "v")
        }

    def feature_axes(self, site: Site, side: str) -> Mapping[str, int] | None:
        return None if any(own.startswith(side) for own in self._sides) else {}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = {}
        for side in self._sides:
            u = _direction(shapes[f"{side}_u"], generator)
            values |= {f"{side}_u": u, f"{side}_v": -u}
        return values

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        side = SIDE_OF_STAGE[stage]
        return _projected(y, params[f"{side}_v"]) - _projected(y, params[f"{side}_u"])

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        side = SIDE_OF_STAGE[stage]
        rows = weight if stage == "input" else weight.T
        change = _projected(rows, params[f"{side}_v"]) - _projected(rows, params[f"{side}_u"])
        return (rows + change) if stage == "input" else (rows + change).T, bias


def _projected(z: Tensor, raw: Tensor) -> Tensor:
    """Block by block (z_i . u_i) u_i for rows u = raw / |raw|; z is (..., d), raw (n, d / n)."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    u = F.normalize(raw.to(wide), dim=-1, eps=EPSILON)
    if len(u) == 1:
        return F.linear(z, u) * u[0]
    parts = z.unflatten(-1, u.shape)
    along = torch.einsum("...nm,nm->...n", parts, u.to(parts.dtype))
    return (along.unsqueeze(-1) * u).flatten(-2)


def _direction(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _blocks(kind: str, site: Site, side: str, blocks: int) -> tuple[int, int]:
    width = site.d_in if side == "input" else site.d_out
    check_divides(kind, "blocks", blocks, width, site)
    return blocks, width // blocks
