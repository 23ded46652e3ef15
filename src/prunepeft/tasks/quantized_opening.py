"""Open a base model whose frozen layers are quantised, with a task head in plain numbers.

transformers would quantise a head too, and cannot make a new one in a model that is quantised on
disk. So every linear layer of the head is kept apart: one that the checkpoint holds in codes is
read back, any other stays plain from the start.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    require,
    stay_trainable,
    stored,
)
from prunepeft.sites import linear_dims
from prunepeft.tasks.loading import check_path, load_config, load_pretrained, make_empty, seeded

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ITEM_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

Tensors = Mapping[str, tuple[tuple[int, ...], int]]  # name -> shape, bytes


def open_quantized(
    model_class: Any,
    folder: str,
    head: Sequence[str] = (),
    *,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    **fields: Any,
) -> PreTrainedModel:
    """Open a model that is quantised on disk with a head that can be trained, or that was.

    Args:
        model_class: Auto class, e.g. `AutoModelForSequenceClassification`.
        folder: Folder or hub id.
        head: Names of the modules to have in plain numbers, e.g. `["bert.pooler", "classifier"]`.
        dtype: `float32`, `bfloat16` or `float16`, of what is not quantised.
        device: `auto`, `cpu` or `cuda`.
        seed: Of weights that the checkpoint lacks.
        trust_remote_code: Whether code that comes with the model may run.
        fields: Of the config, e.g. `num_labels=3`.
    Returns:
        The model in evaluation mode.
    Raises:
        ConfigError: if it is not quantised on disk, cannot be trained through, or has no such head.
        MissingExtraError: if bitsandbytes is needed and not installed.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, **fields)
    storage = stored(config)
    if storage is None:
        raise ConfigError(
            f"model {folder!r} is not quantised on disk; open it with from_pretrained and "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True), or as it is."
        )
    require(storage)
    empty = make_empty(model_class, folder, config, trust_remote_code=trust_remote_code)
    if missing := sorted(set(head) - {name for name, _ in empty.named_modules()}):
        raise ConfigError(f"head names {missing[0]!r}, which {type(empty).__name__} has not.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    opening = make_opening(storage, config, empty, head, check_path(folder), device, dtype)
    options = {"dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code}
    model = load_pretrained(model_class, folder, config, **options, **opening.options)
    return opening.settle(model, seed, folder).eval()


@dataclass
class Opening:
    """How a model is opened that is, or becomes, quantised.

    Attributes:
        head: Names of its modules that are trained in full.
        options: Of `from_pretrained`.
        misfits: Linear layers of the head of which the checkpoint holds codes of another size.
    """

    head: Sequence[str]
    options: dict[str, Any]
    misfits: Sequence[str] = ()

    def settle(self, model: PreTrainedModel, seed: int, path: str) -> PreTrainedModel:
        """Make the model that was just opened ready to be trained around.

        Args:
            model: The model; it is changed in place.
            seed: Of fresh weights.
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
            method = quantizer.quantization_config.quant_method
            raise ConfigError(
                f"model {path!r} is quantised by {getattr(method, 'value', method)} in a way that "
                "transformers cannot train through. Give the full precision model it was made "
                "from, and quantize=8bit or 4bit."
            )
        stay_trainable(model)
        for name, linear in _linears(model, self.head):
            if is_quantized(linear):
                model.set_submodule(name, _plain_linear(linear, model.dtype, name, path))
        with seeded(seed):
            for name in self.misfits:  # transformers takes them for initialised, by their codes
                model._init_weights(model.get_submodule(name))
        _settle_biases(model)
        return model


def make_opening(
    storage: Storage,
    config: PreTrainedConfig,
    empty: PreTrainedModel,
    head: Sequence[str],
    place: str,
    device: str,
    dtype: str,
) -> Opening:
    """Find out how to open a quantised model; the config of one on disk is changed.

    Args:
        storage: How the model is, or becomes, quantised.
        config: The config it is opened with.
        empty: The same model without weights.
        head: Names of its modules that are trained in full.
        place: Folder or hub id.
        device: `cpu` or `cuda`; quantised layers cannot be moved later.
        dtype: Number format of what is not quantised.
    """
    where = torch.cuda.current_device() if device == "cuda" else device
    opening = Opening(head, {"device_map": {"": where}})
    if storage.method == BITSANDBYTES:
        # One line for every forward pass of every layer would bury what matters.
        logging.getLogger(BITSANDBYTES).setLevel(logging.ERROR)
    if storage.settings:
        arguments = storage.arguments(dtype)
        opening.options["quantization_config"] = BitsAndBytesConfig(**arguments)
    elif storage.method == BITSANDBYTES:
        entry = config.quantization_config
        entry = dict(entry if isinstance(entry, Mapping) else entry.to_dict())
        skipped = HfQuantizer.get_modules_to_not_convert(empty, entry.get("llm_int8_skip_modules"))
        fits = _fits_in_file(empty, head, _tensors(place))
        plain = [name for name, fit in fits.items() if not fit]
        opening.misfits = [name for name, fit in fits.items() if fit is False]
        entry["llm_int8_skip_modules"] = sorted({*skipped, *plain})
        config.quantization_config = entry
    return opening


def _settle_biases(model: nn.Module) -> None:
    """Give biases the number format that 4-bit layers give them in their first forward pass."""
    for layer in model.modules():
        dtype, bias = getattr(layer, "compute_dtype", None), getattr(layer, "bias", None)
        if isinstance(dtype, torch.dtype) and isinstance(bias, nn.Parameter):
            bias.data = bias.data.to(dtype)


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


def _fits_in_file(
    empty: PreTrainedModel, head: Sequence[str], tensors: Tensors
) -> dict[str, bool | None]:
    """Linear layer of the head -> whether codes of it are in the checkpoint and fit; None: none."""
    prefix = empty.base_model_prefix
    return {
        name: _fit(name, prefix, linear_dims(linear), tensors)
        for name, linear in _linears(empty, head)
    }


def _fit(name: str, prefix: str, dims: tuple[int, int], tensors: Tensors) -> bool | None:
    d_in, d_out = dims
    for own in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        shape, n_bytes = tensors.get(f"{own}.weight", ((), 0))
        if f"{own}.SCB" in tensors:  # 8 bits
            return shape == (d_out, d_in)
        if f"{own}.weight.absmax" in tensors:  # 4 bits
            return n_bytes == math.ceil(d_in * d_out / 2)
    return None


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
