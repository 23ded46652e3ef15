"""Take heads and neurons out of a model for good: smaller layers, same residual width."""

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prunepeft.errors import StateError
from prunepeft.structured.cut import Cut, check_cut
from prunepeft.structured.groups import BIAS_TABLE, Group
from prunepeft.structured.masks import is_masked
from prunepeft.structured.widths import express
from prunepeft.supernet import base_of, cutting
from prunepeft.supernet.layer import UnionLayer
from prunepeft.supernet.slicing import check_sliceable, slice_layer

# What attentions of transformers call their number of heads and the width of all heads together.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")

Kept = tuple[Tensor | None, Tensor | None]  # output features, input features


def apply_cut(model: nn.Module, groups: Sequence[Group], cut: Cut) -> None:
    """Cut a model to the units that stay, in place.

    Linear layers, biases, head counts, T5's position biases and every module on a cut layer shrink
    together. The function is that of `Masks.show(cut)`. Groups and layers are checked before
    anything is changed. The config is edited where the stock config can say the new widths, see
    `express`.

    Args:
        model: A plain model, or a peft model with union modules on it.
        groups: `find_groups` of the plain model before the cut; all of them, also those that stay
            whole.
        cut: What stays.
    Raises:
        ConfigError: if the cut was made for another model, the base is quantised, or a module on a
            cut layer can be neither cut nor folded (see `supernet.cutting`).
        StateError: if masks are on the model, or it was cut already.
    """
    check_cut(groups, cut)
    base = base_of(model)
    touched = [g for g in groups if len(cut.keep.get(g.id, range(g.n_units))) < g.n_units]
    kept = _kept_features(touched, cut)
    layers = {path: base.get_submodule(path) for path in kept}
    _check(touched, layers)
    cutting.check_cut(model, kept)
    net = model if isinstance(model, PeftModel) else None
    for path, (rows, cols) in kept.items():
        if isinstance(layers[path], UnionLayer):
            cutting.cut_layer(net, path, layers[path], rows, cols)
        else:
            slice_layer(layers[path], rows, cols)
    for group in (g for g in touched if g.what == "heads"):
        for path in _attentions(group):
            _count_heads(base.get_submodule(path), len(cut.keep[group.id]), group)
    _level_zero_bias(base, groups)
    for config in _configs(base):
        express(config, groups, cut)


def _kept_features(groups: Sequence[Group], cut: Cut) -> dict[str, Kept]:
    """Path -> features that stay of its outputs and of its inputs; None: all."""
    kept: dict[str, Kept] = {}
    for group in groups:
        for part in group.parts:
            rows, cols = kept.get(part.path, (None, None))
            stays = part.features(cut.keep[group.id])
            kept[part.path] = (stays, cols) if part.side == "out" else (rows, stays)
    return kept


def _check(groups: Sequence[Group], layers: dict[str, nn.Module]) -> None:
    """Raise an error unless every layer can be cut as its group says."""
    for group in groups:
        for part in group.parts:
            module = layers[part.path]
            layer = module.get_base_layer() if isinstance(module, UnionLayer) else module
            check_sliceable(part.path, layer)
            if is_masked(module) or is_masked(layer):
                raise StateError(
                    f"masks are on the model, at {part.path!r}; they would no longer fit. Take "
                    "them off with Masks.remove() before the cut."
                )
            transposed = not isinstance(layer, nn.Linear)
            width = layer.weight.shape[(part.side == "in") != transposed]
            expected = group.n_units * sum(size for _, size in part.segments)
            if width != expected:
                raise StateError(
                    f"{part.path!r} has {width} features where its group has {expected}; the model "
                    "was cut already. Cut a fresh copy of the base model."
                )


def _attentions(group: Group) -> list[str]:
    """Paths of the attention modules of a group of heads: what holds their query layers."""
    readers = [p.path for p in group.parts if p.side == "out" and not p.path.endswith(BIAS_TABLE)]
    return list(dict.fromkeys(path.rpartition(".")[0] for path in readers))


def _count_heads(attention: nn.Module, n_units: int, group: Group) -> None:
    """Tell an attention how many heads it has now."""
    n_heads = n_units * group.heads_per_unit
    old = group.n_units * group.heads_per_unit
    for name in _COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, n_heads)
    for name in _WIDTHS:
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) // old * n_heads)


def _level_zero_bias(base: nn.Module, groups: Sequence[Group]) -> None:
    """Let T5's cross-attentions differ in heads.

    The first layer of a stack makes one bias of zeros in the shape of its heads for all layers.
    With one head in its shape it fits every layer.
    """
    crossed = [g for g in groups if g.block == "cross_attention"]
    attentions = [base.get_submodule(path) for g in crossed for path in _attentions(g)]
    attentions = [a for a in attentions if hasattr(a, "has_relative_attention_bias")]
    if len({a.n_heads for a in attentions}) > 1:
        for attention in attentions:
            attention.n_heads = 1


def _configs(base: nn.Module) -> list[PreTrainedConfig]:
    """The model's config, and the copies of it that its stacks hold (T5)."""
    top = getattr(base, "config", None)
    if not isinstance(top, PreTrainedConfig):
        return []
    all_of_them = {id(top): top}
    for module in base.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config.model_type == top.model_type:
            all_of_them.setdefault(id(config), config)
    return list(all_of_them.values())
