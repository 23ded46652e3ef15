"""Models of random weights in the shapes of known ones, whole or cut, with LoRA on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from prunepeft.candidates import make_lora_baseline
from prunepeft.sites import find_sites
from prunepeft.structured import Group, apply_cut, choose_units, find_groups
from prunepeft.supernet import attach

RANK = 8
VOCABULARY = 64  # the blocks are measured, not the embeddings
ALIGNED = 64  # a width of a multiple of this is fast on every device


@dataclass(frozen=True)
class Size:
    """How much of a shape is run: layers, and rows and tokens of a training batch."""

    layers: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Shape:
    """A model by its config.

    Attributes:
        family: transformers model type.
        config: Settings of the config.
        sizes: Device type -> how much of it is run there; a device that is not named is left out.
        dtype: Of the frozen weights.
    """

    family: str
    config: Mapping[str, Any]
    sizes: Mapping[str, Size]
    dtype: torch.dtype = torch.float32


SHAPES = {
    "minilm": Shape(
        "bert",
        {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12},
        {"cpu": Size(6, 16, 64), "cuda": Size(6, 64, 128)},
    ),
    "bert-base": Shape("bert", {}, {"cpu": Size(12, 8, 64), "cuda": Size(12, 64, 128)}),
    "llama-1b": Shape(
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        {"cpu": Size(4, 2, 64), "cuda": Size(16, 8, 256)},
    ),
    "llama-7b": Shape(
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        {"cuda": Size(32, 8, 256)},
        torch.bfloat16,
    ),
}
TINY = Shape(
    "llama",
    {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    {"cpu": Size(2, 2, 8), "cuda": Size(2, 2, 8)},
)


@dataclass(frozen=True)
class Variant:
    """What is cut from a model: shares of the heads (or key-value groups) and of the neurons.

    With `aligned` the neurons that stay are rounded up to a multiple of 64.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    aligned: bool = False


VARIANTS = {
    "dense": Variant(),
    "third": Variant({"heads": 1 / 3, "neurons": 1 / 3}),
    "third-aligned": Variant({"heads": 1 / 3, "neurons": 1 / 3}, aligned=True),
    "half": Variant({"heads": 1 / 2, "neurons": 1 / 2}),
}


def make_net(
    shape: Shape, variant: Variant, device: torch.device
) -> tuple[PeftModel, dict[str, int]]:
    """The model with what the variant cuts gone, and LoRA of rank 8 on query and value.

    Returns:
        The model, and the units that are left in a layer, by what they are.
    """
    model = make_model(shape, shape.sizes[device.type].layers, device)
    if variant.ratios:
        groups = find_groups(model)
        generator = torch.Generator().manual_seed(0)
        scores = {g.id: torch.rand(g.n_units, generator=generator) for g in groups}
        apply_cut(model, groups, choose_units(groups, scores, ratios_of(groups, variant)))
    units = {g.what: g.n_units for g in find_groups(model)}
    placement = make_lora_baseline(find_sites(model), 10**12, rank=RANK)
    return attach(model, placement), units


def make_model(shape: Shape, layers: int, device: torch.device) -> PreTrainedModel:
    """The plain model; the same weights for every variant."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        shape.family,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        **shape.config,
    )
    with torch.device(device):
        return AutoModel.from_config(config, dtype=shape.dtype)


def variants_of(shape: Shape) -> list[str]:
    """Names of the variants that cut something, one of those that cut the same."""
    groups = find_groups(make_model(shape, 1, torch.device("meta")))
    cuts = {name: ratios_of(groups, v) for name, v in VARIANTS.items() if v.ratios}
    return [name for i, name in enumerate(cuts) if cuts[name] not in list(cuts.values())[:i]]


def ratios_of(groups: Sequence[Group], variant: Variant) -> dict[str, float]:
    """Shares that whole units make up: a third of 8 key-value groups is 3 of them."""
    ratios = {}
    for what, wanted in variant.ratios.items():
        n = next(g.n_units for g in groups if g.what == what)
        gone = int(wanted * n + 0.5)
        if variant.aligned and what == "neurons":
            gone = n - -(-(n - gone) // ALIGNED) * ALIGNED
        ratios[what] = gone / n
    return ratios


def train_step(net: PeftModel, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward and an optimiser step; x is (rows, tokens) int64."""
    with _autocast(net, x):
        loss = net(input_ids=x).last_hidden_state.float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def infer(net: PeftModel, x: Tensor) -> None:
    """One forward without a cache; x is (rows, tokens) int64."""
    more = {"use_cache": False} if net.config.model_type == "llama" else {}
    with _autocast(net, x):
        net(input_ids=x, **more)


def make_optimizer(net: PeftModel) -> torch.optim.Optimizer:
    """AdamW over what trains."""
    return torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-4)


def _autocast(net: PeftModel, x: Tensor) -> torch.autocast:
    half = next(p.dtype for p in net.parameters() if not p.requires_grad) == torch.bfloat16
    return torch.autocast(x.device.type, torch.bfloat16, enabled=half)
