"""One linear layer with one module on it, for tests of a kind's formula."""

from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.kinds import make_kind
from prunepeft.space import Site
from prunepeft.supernet.layer import Branch, UnionLayer


def make_layer(
    kind: str,
    d_in: int = 12,
    d_out: int = 8,
    *,
    size: int = 1,
    bias: bool = True,
    weight: Tensor | None = None,
    params: dict[str, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> UnionLayer:
    """A frozen random (or given) float64 layer with this module, its values random too."""
    draw = torch.Generator().manual_seed(seed)
    if weight is not None:
        d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias=bias).double().requires_grad_(False)
    linear.weight.copy_(
        torch.randn((d_out, d_in), generator=draw) if weight is None else weight.double()
    )
    if bias:
        linear.bias.copy_(torch.randn(d_out, generator=draw))
    site = Site("layer.0.x", "encoder", 0, 2, "ffn", "down", d_in, d_out, source="layer.0.y")
    layer = UnionLayer(linear)
    made = make_kind(kind, options)
    layer.add("default", Branch("slot", made, site, size, made.scaling(size)), seed)
    layer.set_adapter("default")
    if params is not None:
        layer.set_params("default", kind, {k: v.double() for k, v in params.items()})
    return layer.eval()


def perturb(layer: UnionLayer, seed: int = 1) -> UnionLayer:
    """Add noise to every tensor of the modules."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in own_params(layer).values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
    return layer


def own_params(layer: UnionLayer) -> dict[str, nn.Parameter]:
    """The tensors of the layer's only module."""
    (kind,) = layer.branches["default"]
    return layer.params("default", kind)


def as_matrix(layer: UnionLayer) -> tuple[Tensor, Tensor]:
    """Weight (d_out, d_in) and bias (d_out,) of a linear layer, found by its outputs alone."""
    d_in = layer.get_base_layer().in_features
    with torch.no_grad():
        bias = layer(torch.zeros(d_in).double())
        return (layer(torch.eye(d_in).double()) - bias).T, bias
