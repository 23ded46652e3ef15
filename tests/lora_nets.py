"""Small models with LoRA on every linear layer, their groups, and a pass over a few batches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.kinds import seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Slot
from prunepeft.structured import Group, find_groups
from prunepeft.supernet import attach
from tests.tiny_models import TINY, tiny_inputs

ROLES = ("q", "k", "v", "fused_qkv", "o", "up", "gate", "fused_gate_up", "down")


def lora_net(
    name: str,
    *,
    roles: tuple[str, ...] = ROLES,
    rank: int = 2,
    zero_b: bool = False,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    **overrides: Any,
) -> tuple[PeftModel, tuple[Group, ...]]:
    """A tiny model in training mode with LoRA on these roles, its values random, and its groups."""
    model = TINY[name](**overrides).to(dtype) if model is None else model
    groups = find_groups(model)
    sites = [s for s in find_sites(model) if s.role in roles]
    options = (("alpha", 1.5 * rank),)
    placement = Placement({Slot((s,), "lora", (rank,), options): rank for s in sites})
    net = attach(model, placement).train()
    if not zero_b:
        with torch.no_grad():
            for path, parameter in net.named_parameters():
                if "union_lora_B" in path:
                    drawn = torch.randn(parameter.shape, generator=seeded(1, path))
                    parameter += 0.05 * drawn
    return net, groups


def batch_of(name: str, net: PeftModel, seed: int, batch: int = 4) -> dict[str, Tensor]:
    """Inputs with labels."""
    inputs = tiny_inputs(name, net.base_model.model, batch, seed=seed)
    if name in ("bert", "vit"):
        return inputs | {"labels": torch.arange(batch) % 3}
    if name == "t5":
        return inputs | {"labels": inputs.pop("decoder_input_ids")}
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def backward(name: str, net: PeftModel, seed: int = 0, scale: float = 1.0) -> None:
    """Gradients of one batch."""
    net.zero_grad()
    (scale * net(**batch_of(name, net, seed)).loss).backward()


def train(
    name: str, net: PeftModel, steps: range, after: Callable[[int], None] = lambda step: None
) -> Iterator[int]:
    """SGD on the modules; yields between backward and update, calls `after` at the end."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        net(**batch_of(name, net, step)).loss.backward()
        yield step
        optimizer.step()
        after(step)
