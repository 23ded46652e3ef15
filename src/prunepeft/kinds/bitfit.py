"""BitFit: trained biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.kinds.base import Host, Kind, Params
from prunepeft.space import Site


@dataclass(frozen=True)
class BitFit(Kind):
    """Trained biases: y <- y + db at every layer that has a bias, linear or normalisation layer.

    db is (d_out,) and starts at zero, so a fresh module changes nothing; bias + db is what training
    the bias itself gives. A bias is tiny, so those of one block (attention, feed-forward) are one
    module by default.

    References:
        BitFit, 2021, arXiv 2106.10199, section 3. Differs from released code: biases outside the
        repeated blocks (embeddings, pooler) stay frozen.
    """

    name: ClassVar[str] = "bitfit"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q", "k", "v", "o", "up", "gate", "down", "norm", "other"),
    )
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    in_axes: ClassVar[Mapping[str, int]] = {}
    out_axes: ClassVar[Mapping[str, int]] = {"db": 0}
    home: ClassVar[str] = "a layer with a bias"
    formula: ClassVar[str] = "d_out"

    def fits(self, site: Site) -> bool:
        return site.has_bias

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("add",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        return {"db": (site.d_out,)}

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {"db": torch.zeros(shapes["db"])}

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return params["db"].expand_as(y)

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        return weight, None if bias is None else bias + params["db"]
