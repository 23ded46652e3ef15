"""Serial adapter: a bottleneck after a sub-layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.kinds.base import Host, Params
from prunepeft.kinds.bottleneck import Bottleneck
from prunepeft.space import Site


@dataclass(frozen=True)
class SerialAdapter(Bottleneck):
    """Bottleneck on the output of a layer: y <- y + s * up(act(down(y))).

    On `down` sites it follows the feed-forward (Pfeiffer); add `o` for after the attention as well
    (Houlsby). Options: see `Bottleneck`.

    References:
        Houlsby et al., 2019, arXiv 1902.00751, section 2.1. Pfeiffer et al., 2020, arXiv 2005.00247
        (the library of that line of work has ReLU as its default, and so have we). Differs from
        released code: the weights start as `Bottleneck` says, not from N(0, std 0.02).
    """

    name: ClassVar[str] = "serial_adapter"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("down",),)

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("output",)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return self.transform(params, y, scaling, host.training)
