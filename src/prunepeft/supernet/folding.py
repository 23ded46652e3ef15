"""Fold modules of a layer into its frozen weight, and start them again at another width."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunepeft.errors import SiteError
from prunepeft.kinds.base import STAGES
from prunepeft.sites import linear_dims
from prunepeft.supernet.layer import Branch, UnionLayer

logger = logging.getLogger(__name__)

Module = tuple[str, Branch]  # its adapter, itself


def modules_of(layer: UnionLayer) -> list[Module]:
    """Every module on a layer, in the order in which those of one stage act."""
    return [(a, b) for a, branches in layer.branches.items() for b in branches.values()]


def with_nearer(layer: UnionLayer, chosen: Sequence[Module]) -> list[Module]:
    """The chosen modules and all that have to be folded with them.

    Those are the modules that act between one of them and the frozen weight, and modules that
    depend on the weight, which will be another.
    """
    modules = modules_of(layer)
    order = {id(branch): i for i, (_, branch) in enumerate(modules)}
    found = {id(branch) for _, branch in chosen}
    grown = True
    while grown:
        more = {
            id(inner)
            for _, inner in modules
            for _, outer in modules
            if id(outer) in found and _is_nearer(inner, outer, order)
        }
        grown = not more <= found
        found |= more
    return [m for m in modules if id(m[1]) in found]


def _is_nearer(inner: Branch, outer: Branch, order: dict[int, int]) -> bool:
    if "add" in inner.stages and inner.kind.reads_weight:
        return True
    return any(
        _acts_nearer((s, order[id(inner)]), (t, order[id(outer)]))
        for s in inner.stages
        for t in outer.stages
    )


def _acts_nearer(inner: tuple[str, int], outer: tuple[str, int]) -> bool:
    """Whether one change (its stage and place in the order) lies between another and W."""
    (stage, place), (of, of_place) = inner, outer
    if of == "input":
        return stage == "input" and place > of_place
    if of == "product":
        return stage == "product" and place < of_place
    if of == "add":
        return stage in ("input", "product")
    is_before = (STAGES.index(stage), place) < (STAGES.index(of), of_place)
    return is_before and stage != "attention"


def set_frozen(layer: UnionLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Give the frozen layer this weight (d_out, d_in) and bias, for good."""
    linear = layer.get_base_layer()
    new = weight.T if layer.is_transposed else weight
    linear.weight.data = new.contiguous().to(linear.weight)
    layer._row_norm = None
    if bias is not None:
        linear.bias.data = bias.to(linear.bias)


def drop(layer: UnionLayer, adapter: str, branch: Branch, reason: str) -> None:
    """Take a module off and say so."""
    layer.drop(adapter, branch.kind.name)
    logger.warning("%s at %s goes with the cut: %s.", branch.kind.name, branch.site.path, reason)


def restart(layer: UnionLayer, adapter: str, old: Branch, seed: int) -> None:
    """Start a module that was folded again at the layer's width of now, changing no output.

    It is dropped if it does not fit the width, or cannot start without a change.
    """
    kind = old.kind
    first = next(iter(layer.params(adapter, kind.name).values()))
    d_in, d_out = linear_dims(layer.get_base_layer())
    if not d_in:
        drop(layer, adapter, old, "its layer has no input left")
        return
    try:
        site = replace(old.site, d_in=d_in, d_out=d_out)
        new = Branch(old.slot_id, kind, site, old.size, old.scaling)
    except SiteError as error:
        drop(layer, adapter, old, f"it is folded into the weight and cannot start again ({error})")
        return
    layer.drop(adapter, kind.name)
    layer.add(adapter, new, seed)
    for parameter in layer.params(adapter, kind.name).values():
        parameter.data = parameter.data.to(first)
        parameter.requires_grad_(first.requires_grad)
    if _is_undone(layer, (adapter, new)):
        logger.info("%s at %s is folded and starts again.", kind.name, site.path)
    else:
        drop(layer, adapter, new, "it is folded into the weight, and a fresh one is no identity")


def _is_undone(layer: UnionLayer, module: Module) -> bool:
    """Change the frozen weight such that this fresh module changes nothing; False if none is found.

    Most need no change. A sum is undone by a difference, a reflection by itself.
    """
    linear = layer.get_base_layer()
    weight = layer.frozen_weight().detach().clone()
    bias = None if linear.bias is None else linear.bias.detach().clone()
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # as fresh values are
    atol = 64 * eps * float(weight.abs().max())

    def is_same() -> bool:
        new, new_bias = layer.merged_with([module])
        return torch.allclose(new.to(weight), weight, rtol=0, atol=atol) and (
            bias is None or torch.allclose(new_bias.to(bias), bias, rtol=0, atol=atol)
        )

    if is_same():
        return True
    changed, changed_bias = layer.merged_with([module])
    if module[1].stages == ("add",):
        changed = 2 * weight - changed
        changed_bias = None if bias is None else 2 * bias - changed_bias
    set_frozen(layer, changed, changed_bias)
    if is_same():
        return True
    set_frozen(layer, weight, bias)
    return False
