"""Cut features out of one frozen layer, in place."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunepeft.errors import ConfigError
from prunepeft.quantized import is_quantized

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_sliceable(path: str, layer: nn.Module) -> None:
    """Raise ConfigError unless features can be cut out of this layer: a plain one in floats."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(layer, nn.Linear | Conv1D | nn.Embedding) and isinstance(weight, Tensor)
    quantised = isinstance(layer, nn.Linear) and is_quantized(layer)
    if not plain or weight.ndim != 2 or weight.dtype not in _FLOATS or quantised:
        of = f" of {str(weight.dtype).removeprefix('torch.')}" if plain else ""
        raise ConfigError(
            f"{path!r} is a {type(layer).__name__}{of}; heads and neurons can only be cut out of "
            "linear layers whose weights are plain floats. If the base model is quantised, load it "
            "in bfloat16 or float32 to cut it, save it, and quantise the smaller model again."
        )


def slice_layer(layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> None:
    """Keep these output features and these input features of a linear layer, in place.

    The module stays the same object with its hooks, and so do its parameters.

    Args:
        layer: `nn.Linear`, a transposed `Conv1D`, or an `nn.Embedding` (its columns are rows here).
        rows: Output features that stay, ascending, (d_out',); None: all.
        cols: Input features that stay, ascending, (d_in',); None: all.
    """
    transposed = isinstance(layer, Conv1D | nn.Embedding)
    bias = getattr(layer, "bias", None)
    for axis, keep in enumerate((rows, cols)):
        if keep is not None:
            _keep(layer.weight, 1 - axis if transposed else axis, keep)
    if rows is not None and bias is not None:
        _keep(bias, 0, rows)
    if isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif transposed:
        layer.nx, layer.nf = layer.weight.shape
        if not layer.nx:
            layer.__class__ = _OnlyBias
    else:
        layer.out_features, layer.in_features = layer.weight.shape


class _OnlyBias(Conv1D):
    """A `Conv1D` that has lost all its inputs; the stock one cannot reshape an empty input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], self.nf)


def _keep(parameter: nn.Parameter, axis: int, keep: Tensor) -> None:
    parameter.grad = None
    parameter.data = parameter.data.index_select(axis, keep.to(parameter.device))
