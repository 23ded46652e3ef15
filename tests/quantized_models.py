"""Tiny models in 8 and 4 bits, and the plain model that each of them stands for."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunepeft.quantized import asked, dense_weight, is_quantized, stay_trainable
from prunepeft.sites import linear_dims
from tests.tiny_models import TINY

HEADS = {"bert": ("bert.pooler", "classifier"), "llama": (), "gpt2": (), "t5": ()}
WORDS = ("8bit", "4bit")


def save_quantized(
    folder: Path, model_class: Any, source: Path, word: str, max_shard_size: str = "1GB"
) -> Path:
    """Quantise the model of a folder as transformers does, head and all, into another folder."""
    options = {f"load_in_{word}": True} | ({"bnb_4bit_quant_type": "nf4"} if word == "4bit" else {})
    model = model_class.from_pretrained(source, quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_quantized(
    family: str, word: str, folder: Path, compute: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model in few bits, and the plain one with the very weights its codes stand for.

    Args:
        family: A key of `HEADS`.
        word: `8bit` or `4bit`.
        folder: Where the plain model may be written.
        compute: Number format of 4-bit layers.
    """
    plain = TINY[family]()
    plain.save_pretrained(folder)
    settings = asked(word, plain, HEADS[family]).arguments(compute)
    model = type(plain).from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    stay_trainable(model.eval())
    for name, layer in quantized_layers(model).items():
        own, weight = plain.get_submodule(name), dense_weight(layer)
        with torch.no_grad():
            own.weight.copy_(weight.T if isinstance(own, Conv1D) else weight)
    for each in (model, plain):
        each.requires_grad_(False)
    return model, plain


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every quantised linear layer by its path."""
    return {n: m for n, m in model.named_modules() if linear_dims(m) and is_quantized(m)}
