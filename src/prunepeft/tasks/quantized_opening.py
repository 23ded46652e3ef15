"""Open a base model whose frozen layers are quantised, with a task head in plain numbers.

transformers would quantise a head too, and cannot make a new one in a model that is quantised on
disk. So every linear layer of the head is kept apart: one that the checkpoint holds in codes is
read back, any other stays plain from the start.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils import cached_file

from prunepeft.errors import ConfigError
from prunepeft.quantized import (
    BITSANDBYTES,
    Storage,
    dense_weight,
    is_quantized,
    is_readable,
    stay_trainable,
)
from prunepeft.sites import linear_dims

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ITEM_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

Tensors = Mapping[str, tuple[tuple[int, ...], int]]  # name -> shape, bytes


def opening_options(
    storage: Storage,
    config: PreTrainedConfig,
    empty: PreTrainedModel,
    head: Sequence[str],
    place: str,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Options of `from_pretrained` for a quantised model; of one on disk the config is changed.

    Args:
        storage: How the model is, or becomes, quantised.
        config: The config it is opened with.
        empty: The same model without weights.
        head: Names of its modules that are trained in full.
        place: Folder or hub id.
        device: `cpu` or `cuda`; quantised layers cannot be moved later.
        dtype: Number format of what is not quantised.
    """
    options: dict[str, Any] = {
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else device}
    }
    if storage.method == BITSANDBYTES:
        # One line for every forward pass of every layer would bury what matters.
        logging.getLogger(BITSANDBYTES).setLevel(logging.ERROR)
    if storage.settings:
        options["quantization_config"] = BitsAndBytesConfig(**storage.arguments(dtype))
    elif storage.method == BITSANDBYTES:
        entry = config.quantization_config
        entry = dict(entry if isinstance(entry, Mapping) else entry.to_dict())
        skipped = HfQuantizer.get_modules_to_not_convert(empty, entry.get("llm_int8_skip_modules"))
        plain = _plain_in_file(empty, head, _tensors(place))
        entry["llm_int8_skip_modules"] = sorted({*skipped, *plain})
        config.quantization_config = entry
    return options


def settle(model: PreTrainedModel, head: Sequence[str], path: str) -> PreTrainedModel:
    """Make a quantised model that was just opened ready to be trained around.

    Args:
        model: The model; it is changed in place.
        head: Names of its modules that are trained in full.
        path: Its name, for errors.
    Returns:
        The model.
    Raises:
        ConfigError: if gradients do not pass its layers, or its head cannot be read back.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return model
    if not quantizer.is_trainable:
        raise ConfigError(
            f"model {path!r} is quantised by {quantizer.quantization_config.quant_method}, through "
            "which transformers cannot train. Give the full precision model it was made from, and "
            "quantize=8bit or 4bit."
        )
    stay_trainable(model)
    for name, linear in _linears(model, head):
        if is_quantized(linear):
            model.set_submodule(name, _plain_linear(linear, model.dtype, name, path))
    for layer in model.modules():
        dtype, bias = getattr(layer, "compute_dtype", None), getattr(layer, "bias", None)
        if isinstance(dtype, torch.dtype) and isinstance(bias, nn.Parameter):
            bias.data = bias.data.to(dtype)  # 4-bit layers do so in their first forward pass
    return model


def _linears(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    inside = tuple(f"{name}." for name in names)
    return [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}.".startswith(inside) and linear_dims(module)
    ]


def _plain_linear(linear: nn.Module, dtype: torch.dtype, name: str, path: str) -> nn.Linear:
    """The same layer in plain numbers that can be trained."""
    if not is_readable(linear):
        raise ConfigError(
            f"the task head of model {path!r} is quantised too ({name} is a "
            f"{type(linear).__name__}) and cannot be read back to be trained. Give the full "
            "precision model it was made from, and quantize=8bit or 4bit."
        )
    weight = dense_weight(linear).to(dtype)
    d_in, d_out = linear_dims(linear)
    plain = nn.Linear(d_in, d_out, linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.clone())
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(dtype).clone())
    return plain


def _plain_in_file(empty: PreTrainedModel, head: Sequence[str], tensors: Tensors) -> list[str]:
    """Linear layers of the head of which the checkpoint has no codes that fit."""
    return [
        name
        for name, linear in _linears(empty, head)
        if not _has_codes(name, empty.base_model_prefix, linear_dims(linear), tensors)
    ]


def _has_codes(name: str, prefix: str, dims: tuple[int, int], tensors: Tensors) -> bool:
    """Whether the checkpoint holds this layer in the codes of bitsandbytes, in this size."""
    d_in, d_out = dims
    for own in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        shape, n_bytes = tensors.get(f"{own}.weight", ((), 0))
        if f"{own}.SCB" in tensors:
            return shape == (d_out, d_in)
        if f"{own}.weight.absmax" in tensors:
            return n_bytes == math.ceil(d_in * d_out / 2)
    return False


def _tensors(place: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Every tensor of a checkpoint, from the headers of its files; {} for another form."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in _files(place):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                found[name] = shape, math.prod(shape) * _ITEM_BYTES.get(part.get_dtype(), 0)
    return found


def _files(place: str) -> Iterator[str]:
    local = {"local_files_only": Path(place).is_dir()}
    try:
        yield cached_file(place, _SINGLE, **local)
        return
    except OSError:  # it comes in several files, or in another form
        pass
    try:
        index = cached_file(place, _INDEX, **local)
    except OSError:
        return
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    yield from (cached_file(place, shard, **local) for shard in dict.fromkeys(shards))
