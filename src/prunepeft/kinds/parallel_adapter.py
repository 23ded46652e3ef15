"""Parallel adapter: a bottleneck beside a whole sub-layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.errors import SiteError
from prunepeft.kinds.base import Host, Params
from prunepeft.kinds.bottleneck import Bottleneck
from prunepeft.space import Site


@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """Bottleneck from the sub-layer's input to its output: y <- y + s * up(act(down(x_sub))).

    It sits on the layer that writes the sub-layer's output (`o` or `down`) and reads what the
    sub-layer read, so both sides have the width of the residual stream. Options: see `Bottleneck`.

    References:
        He et al., 2021, arXiv 2110.04366, table 1; their best model (MAM) has `scale` 4. Differs
        from released code: dropout is on the input, not in the bottleneck.
    """

    name: ClassVar[str] = "parallel_adapter"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("down",),)
    needs_source: ClassVar[bool] = True
    home: ClassVar[str] = "a layer that writes a sub-layer's output (role o or down)"

    def stages(self, site: Site) -> tuple[str, ...]:
        if not site.source:
            raise SiteError(
                f"{self.name} needs a site that writes a sub-layer's output (role o or down); "
                f"{site.path} has role {site.role!r}. Choose other roles or another kind."
            )
        return ("add",)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        source = host.sublayer_input().to(params["down"].dtype)
        return self.transform(params, source, scaling, host.training)
