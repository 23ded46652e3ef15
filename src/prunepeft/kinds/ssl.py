"""SSL and SSB: one trained multiplier per input feature, or per input and output feature."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.kinds.base import Host, Kind, Params
from prunepeft.space import Site


@dataclass(frozen=True)
class Ssl(Kind):
    """Scaled subspace, left: x <- l * x before the layer, which is W diag(l).

    l is (d_in,) and starts at one, so a fresh module changes nothing.

    References:
        SSL and SSB, 2024, arXiv 2407.05417, which writes W as (in, out).
        Differs from released code: no scaled copy of the weight is made, and it can be merged.
    """

    name: ClassVar[str] = "ssl"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("k", "v"), ("up", "gate"))
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    in_axes: ClassVar[Mapping[str, int]] = {"l": 0}
    out_axes: ClassVar[Mapping[str, int]] = {}
    formula: ClassVar[str] = "d_in"

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("input",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"l": (site.d_in,)}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in shapes.items()}

    def neutral(self, name: str, host: Host) -> Tensor | float:
        return 1.0

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return y * (params["l"] - 1)

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        return weight * params["l"], bias


@dataclass(frozen=True)
class Ssb(Ssl):
    """Scaled subspaces, both: W <- diag(s) W diag(l).

    l is (d_in,), s is (d_out,); both start at one, so a fresh module changes nothing. A factor can
    move from s to l without a change, so compare weights, not vectors.

    Attributes:
        scale_bias: Whether s multiplies the bias too, as IA3 does.
    References:
        SSL and SSB, 2024, arXiv 2407.05417. Differs from released code as `Ssl` does.
    """

    name: ClassVar[str] = "ssb"
    out_axes: ClassVar[Mapping[str, int]] = {"s": 0}
    formula: ClassVar[str] = "d_in + d_out"

    scale_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scale_bias, bool):
            raise ConfigError(f"ssb.scale_bias must be true or false; got {self.scale_bias!r}.")

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("input", "scale" if self.scale_bias else "product")

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"l": (site.d_in,), "s": (site.d_out,)}

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return y * (params["l" if stage == "input" else "s"] - 1)

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        if stage == "input":
            return weight * params["l"], bias
        scaled = bias * params["s"] if bias is not None and self.scale_bias else bias
        return weight * params["s"][:, None], scaled
