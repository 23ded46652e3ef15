"""LNFit: trained scales and biases of the normalisation layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.kinds.base import Host, Kind, Params
from prunepeft.space import Site


@dataclass(frozen=True)
class LnFit(Kind):
    """Trained normalisation layers: y <- y + (g - 1) (y - b) + db, with b the layer's own bias.

    g multiplies the pretrained scale and starts at one; db is there only if the layer has a bias
    and starts at zero. So a fresh module changes nothing, and a layer of scale s ends with the
    scale g s and the bias b + db. g is relative: the step that moves the scale itself by 0.1 moves
    g by 0.1 / s.

    References:
        LN-tuning, 2022, arXiv 2211.08682 (scale and bias). Tuning LayerNorm in attention, 2023,
        arXiv 2312.11420. S3Delta, 2022, arXiv 2206.07382, has the scale alone. Differs from
        released code: that trains the scale itself or a vector added to it, and in some the norm
        after the last layer too.
    """

    name: ClassVar[str] = "lnfit"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("norm",),)
    mergeable: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    home: ClassVar[str] = "a normalisation layer with a scale"
    formula: ClassVar[str] = "d_out (2 d_out with a bias)"

    def fits(self, site: Site) -> bool:
        return site.role == "norm"

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("add",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        names = ("g", "db") if site.has_bias else ("g",)
        return dict.fromkeys(names, (site.d_out,))

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {k: torch.ones(v) if k == "g" else torch.zeros(v) for k, v in shapes.items()}

    def neutral(self, name: str, host: Host) -> Tensor | float:
        return 1.0 if name == "g" else 0.0

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return host.frozen_linear(x) * (params["g"] - 1) + params.get("db", 0.0)

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        scale = weight * params["g"]
        return scale, bias if bias is None or "db" not in params else bias + params["db"]
