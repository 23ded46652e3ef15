"""IA3: one trained multiplier per feature."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.kinds.base import Host, Kind, Params
from prunepeft.space import Site


@dataclass(frozen=True)
class Ia3(Kind):
    """Rescaled activations: y <- l * y after the layer, or x <- l * x before it at `down` sites.

    l starts at one, so a fresh module changes nothing. As a residual: y * (l - 1).

    References:
        IA3, 2022, arXiv 2205.05638, section 3.3. There l acts on keys, values and the hidden
        activation of the feed-forward, which is the input of its `down` layer.
    """

    name: ClassVar[str] = "ia3"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("k", "v"), ("down",))
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    formula: ClassVar[str] = "d_out (d_in at down)"

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("input",) if site.role == "down" else ("scale",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"l": (site.d_in if self.stages(site) == ("input",) else site.d_out,)}

    def feature_axes(self, site: Site, side: str) -> Mapping[str, int] | None:
        return {"l": 0} if (side == "in") == (self.stages(site) == ("input",)) else {}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {"l": torch.ones(shapes["l"])}

    def neutral(self, name: str, host: Host) -> Tensor | float:
        return 1.0

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return y * (params["l"] - 1)

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        if stage == "input":
            return weight * params["l"], bias
        return weight * params["l"][:, None], None if bias is None else bias * params["l"]
