"""A host without a model, for calling a kind's pure functions by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.space import Site


class PlainHost:
    """A frozen linear layer without anything around it, for calling a kind by hand.

    Args:
        weight: Frozen weight, (d_out, d_in).
        source: What the sub-layer read, (..., d_out).
        training: Whether dropout is on.
    """

    def __init__(
        self, weight: Tensor, source: Tensor | None = None, *, training: bool = False
    ) -> None:
        self.weight = weight
        self.source = source
        self.training = training

    def frozen_weight(self) -> Tensor:
        return self.weight

    def frozen_row_norm(self) -> Tensor:
        return torch.linalg.norm(self.weight, dim=1)

    def frozen_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def sublayer_input(self) -> Tensor:
        if self.source is None:
            raise ConfigError("this PlainHost has no source; pass one for kinds that read it.")
        return self.source


def double_host(site: Site, draw: torch.Generator) -> tuple[PlainHost, Tensor, Tensor]:
    """Draw a float64 host, an input (2, d_in) and an output so far (2, d_out)."""
    weight, x, y, source = (
        torch.randn(shape, generator=draw).double()
        for shape in (
            (site.d_out, site.d_in),
            (2, site.d_in),
            (2, site.d_out),
            (2, site.d_out),
        )
    )
    return PlainHost(weight, source), x, y
