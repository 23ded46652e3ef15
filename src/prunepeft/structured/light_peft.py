"""Light-PEFT's early scores: of heads, neurons, modules and ranks, all in one short training."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.errors import StateError, UnknownNameError
from prunepeft.kinds import slot_kind
from prunepeft.registry import unknown_name
from prunepeft.structured.groups import Group
from prunepeft.structured.importance import (
    RANK_IMPORTANCE,
    LateMean,
    rank_importance,
    relative_change,
)
from prunepeft.structured.masks import Masks
from prunepeft.supernet import placement_of, slot_layers
from prunepeft.supernet.attach import ADAPTER
from prunepeft.supernet.layer import Branch, UnionLayer

_MASKS = "early_masks"  # name of the masks on the net


class EarlyScores:
    """A `Watcher` that trains masks of heads and neurons and scores modules and their ranks.

    Found, on the CPU: `mask.<group id>` (n_units,), the masks at the end, which are near 1;
    `module.<slot id>` (), mean over steps of the mean of |a| / |z| over valid tokens;
    `rank.<slot id>` (r,), mean over steps, for kinds with ranks. Means are over the second half of
    the steps. Tied sites of a slot are one module: their tokens are pooled, their ranks summed.
    Of a module's tensors the matrices count, not its biases.

    A step's score is that of the whole step, however it is cut: gradients are summed over its
    micro-batches, and ratios are averaged over the valid tokens of all. What gradient checkpointing
    runs again is not counted again. Valid tokens are those of `attention_mask` (in a decoder with
    an encoder, `decoder_attention_mask`), given by keyword; without one all are.

    Args:
        groups: Whose units get a mask; none is fine.
        l1: Factor of the masks' L1 norm in the loss, summed over all entries; the modules' scores
            come from the loss of the task alone.
        modules: Whether to score modules.
        ranks: Whether to score ranks.
        how: See `rank_importance`.
    References:
        Light-PEFT, 2024, arXiv 2406.03792. Differs from released code: the mask of a
        head scales the head's output (the same function), scores are of optimiser steps, not of
        micro-batches, and see `relative_change` and `LateMean`.
    """

    def __init__(
        self,
        groups: Sequence[Group] = (),
        *,
        l1: float = 1e-4,
        modules: bool = True,
        ranks: bool = True,
        how: str = "mean",
    ) -> None:
        if how not in RANK_IMPORTANCE:
            raise UnknownNameError(unknown_name("rank importance", how, RANK_IMPORTANCE))
        self.groups = tuple(groups)
        self.l1 = l1
        self.how = how
        self.config: dict[str, Any] = {
            "watcher": "light-peft",
            "groups": [group.id for group in self.groups],
            "l1": l1,
            "modules": modules,
            "ranks": ranks,
            "rank_importance": how,
        }
        self._leave: list[Callable[[], None]] = []

    def attach(self, net: PeftModel) -> None:
        """See `Watcher.attach`."""
        if self._leave:
            raise StateError("these scores are being recorded already; stop the recording first.")
        layers = slot_layers(net)
        self._index = {slot_id: i for i, slot_id in enumerate(layers)}
        self._valid: dict[bool, Tensor | None] = {}
        self._tokens: Tensor | None = None
        self._anchor = next(net.parameters())  # where it is, the sums are
        self._sides = _rank_sides(net) if self.config["ranks"] else {}
        self._masks: Masks | None = None
        self.start(0)
        if self.groups:
            self._masks = Masks(net.base_model.model, self.groups, trainable=True)
            net.add_module(_MASKS, self._masks.to(self._anchor.device))
            self._leave += [self._masks.remove, partial(delattr, net, _MASKS)]
        if self.config["modules"]:
            self._leave.append(
                net.register_forward_pre_hook(self._read_masks, with_kwargs=True).remove
            )
            self._is_pair = bool(getattr(net.base_model.model.config, "is_encoder_decoder", False))
            for layer in {layer: None for pairs in layers.values() for layer, _ in pairs}:
                if layer.observer is not None:
                    self.abandon()
                    raise StateError("another recorder watches these layers; leave it first.")
                layer.observer = partial(self._observe, layer)
                self._leave.append(partial(setattr, layer, "observer", None))

    def start(self, steps: int) -> None:
        """See `Watcher.start`."""
        self._module_mean, self._rank_mean = LateMean(steps), LateMean(steps)
        self.mark()

    def mark(self) -> None:
        """See `Watcher.mark`."""
        self._marked = (copy.copy(self._module_mean), copy.copy(self._rank_mean))

    def reset(self) -> None:
        """See `Watcher.reset`."""
        self._module_mean, self._rank_mean = (copy.copy(mean) for mean in self._marked)
        self._tokens = None

    @torch.no_grad()
    def step(self) -> None:
        """See `Watcher.step`."""
        if self.config["modules"]:
            total, count = self._pooled()
            self._module_mean.add(total / count)  # not finite where a module saw no token
        if self._sides:
            self._rank_mean.add(self._rank_scores() if self._rank_mean.is_due else torch.empty(0))
        for mask in [] if self._masks is None else self._masks.parameters():
            slope = self.l1 * mask.sign()
            mask.grad = slope if mask.grad is None else mask.grad + slope
        self._tokens = None

    def stop(self) -> dict[str, Tensor]:
        """See `Watcher.stop`."""
        found: dict[str, Tensor] = {}
        if self._masks is not None:
            found |= {f"mask.{g.id}": self._masks[g.id].detach().cpu().clone() for g in self.groups}
        if self.config["modules"]:
            scores = self._module_mean.mean()
            found |= {f"module.{slot_id}": scores[i] for slot_id, i in self._index.items()}
        if self._sides:
            sizes = [sides[0][0].shape[sides[0][1]] for sides in self._sides.values()]
            parts = self._rank_mean.mean().split(sizes)
            found |= {f"rank.{i}": s for i, s in zip(self._sides, parts, strict=True)}
        self.abandon()
        return {name: tensor.clone() for name, tensor in found.items()}

    def abandon(self) -> None:
        """See `Watcher.abandon`."""
        while self._leave:
            self._leave.pop()()
        self._masks = None

    def _rank_scores(self) -> Tensor:
        """Scores of all ranks of all modules in this step."""
        scores = []
        for sides in self._sides.values():
            given = [
                (w, torch.zeros_like(w) if w.grad is None else w.grad, axis) for w, axis in sides
            ]
            scores.append(rank_importance(given, self.how).to(self._anchor.device))
        return torch.cat(scores)

    def _pooled(self) -> Tensor:
        """Ratios and tokens of this step, (2, modules), over all processes."""
        tokens = self._no_tokens() if self._tokens is None else self._tokens
        if dist.is_available() and dist.is_initialized() and self._module_mean.is_due:
            dist.all_reduce(tokens)
        return tokens

    def _no_tokens(self) -> Tensor:
        return torch.zeros(2, len(self._index), device=self._anchor.device)

    @torch.no_grad()
    def _observe(self, layer: UnionLayer, branch: Branch, delta: Tensor, base: Tensor) -> None:
        # A graph task runs while gradient checkpointing repeats a forward pass that was counted.
        repeated = torch._C._current_graph_task_id() != -1
        if not layer.training or repeated or not self._module_mean.is_due:
            return
        if "attention" in branch.stages:  # (B, T, H, d)
            delta, base = delta.flatten(-2), base.flatten(-2)
        site = branch.site
        reads_encoder = site.block == "cross_attention" and site.role in ("k", "v")
        valid = self._valid.get(self._is_pair and site.stack == "decoder" and not reads_encoder)
        if valid is not None and valid.numel() != base[..., 0].numel():
            return  # not of tokens: DeBERTa runs keys over its relative positions too
        if self._tokens is None:
            self._tokens = self._no_tokens()
        found = relative_change(delta, base, valid)
        self._tokens[:, self._index[branch.slot_id]] += found.to(self._tokens.device)

    def _read_masks(self, net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._valid = {False: _valid_tokens(kwargs, ""), True: _valid_tokens(kwargs, "decoder_")}


def _valid_tokens(inputs: Mapping[str, Any], prefix: str) -> Tensor | None:
    """True for every real token, (B, T) (or with choices, (B, C, T)); None: no such mask."""
    mask = inputs.get(f"{prefix}attention_mask")
    tokens = inputs.get(f"{prefix}input_ids")
    if tokens is None and (embedded := inputs.get(f"{prefix}inputs_embeds")) is not None:
        tokens = embedded[..., 0]
    if mask is None or tokens is None or mask.shape != tokens.shape:
        return None
    return mask != 0


def _rank_sides(net: PeftModel) -> dict[str, list[tuple[nn.Parameter, int]]]:
    """Slot id -> matrices that its ranks own a part of, with the axis of the ranks."""
    kinds = {slot.id: slot_kind(slot) for slot in placement_of(net)}
    sides: dict[str, list[tuple[nn.Parameter, int]]] = {}
    for slot_id, layers in slot_layers(net).items():
        for layer, name in layers:
            for tensor, parameter in layer.params(ADAPTER, name).items():
                axes = kinds[slot_id].rank_axes(tensor, parameter) if parameter.ndim > 1 else ()
                sides.setdefault(slot_id, []).extend((parameter, axis) for axis in axes)
    return {slot_id: pairs for slot_id, pairs in sides.items() if pairs}
