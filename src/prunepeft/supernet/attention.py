"""Prefixes inside an attention: trained keys and values before those of the tokens.

An attention of transformers looks up the function that computes it under a name in its config. One
that carries a prefix gets a copy of its config with the name of `attend`. The model keeps its own
config, which makes the masks and says what `attend` runs in turn: sdpa or eager.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from prunepeft.errors import ConfigError, SiteError
from prunepeft.supernet.layer import Branch, UnionLayer

NAME = "prunepeft_prefix"
_OWN = "_config_without_prefix"
_LOOK_UP = {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "_attn_implementation"}

Output = tuple[Tensor, Tensor | None]
Prefix = tuple[UnionLayer, str, Branch]  # the layer it lies on, its adapter, itself


def check_attention(module: nn.Module, path: str, *, is_fused: bool = False) -> None:
    """Raise an error unless this attention can carry a prefix.

    Raises:
        SiteError: if it does not go through the attention interface of transformers.
        ConfigError: if the model runs another implementation than sdpa or eager.
    """
    forward = inspect.unwrap(type(module).forward)
    looks_up = _LOOK_UP <= set(forward.__code__.co_names)
    upcasts = getattr(module, "reorder_and_upcast_attn", False)  # GPT-2: a way of its own
    if not looks_up or upcasts or not hasattr(module, "config"):
        raise SiteError(
            f"the attention {path!r} ({type(module).__name__}) cannot carry a prefix: it does not "
            "go through the attention interface of transformers. Use other kinds on this model."
        )
    if is_fused and getattr(module, "num_key_value_groups", 1) != 1:
        raise SiteError(
            f"the attention {path!r} shares keys among its heads in a fused layer, which does not "
            "tell the width of the keys, so it cannot carry a prefix. Use other kinds."
        )
    _implementation(module)


def carry(module: nn.Module) -> None:
    """Let an attention run `attend`."""
    if not hasattr(module, _OWN):
        setattr(module, _OWN, module.config)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = NAME  # the property would reach subconfigs


def release(model: nn.Module) -> None:
    """Give every attention without a prefix its own config back."""
    for module in model.modules():
        if hasattr(module, _OWN) and not any(
            "attention" in branch.stages
            for layer in _layers(module)
            for branches in layer.branches.values()
            for branch in branches.values()
        ):
            module.config = module.__dict__.pop(_OWN)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Output:
    """Attention of the tokens to the active prefixes and to one another.

    The attention weights of a prefix are multiplied by its gate before all are made to sum to one.
    The weights returned are those of the tokens alone, in the usual shape; with a prefix they sum
    to less than one.

    Args:
        module: The attention; prefixes lie on its layers.
        query: (B, H, T, d).
        key: Keys of the tokens, (B, H_kv, S, d).
        value: Values of the tokens, (B, H_kv, S, d).
        attention_mask: Boolean or additive, broadcasts to (B, H, T, S); None as the implementation
            takes it.
        dropout: Probability on the attention weights.
        kwargs: What else the implementation takes.
    Returns:
        Output (B, T, H, d), and weights (B, H, T, S) or None.
    """
    prefixes = [
        (layer, adapter, branch)
        for layer in _layers(module)
        for adapter, branch in layer.active_branches()
        if "attention" in branch.stages
    ]

    def run(shown: Sequence[Prefix], dropout: float = 0.0) -> Output:
        inputs = (query, key, value, attention_mask)
        return _attention(module, shown, *inputs, dropout=dropout, **kwargs)

    for prefix in prefixes:
        layer, _, branch = prefix
        if layer.observer is not None:
            with torch.no_grad():  # and without dropout, whose noise would pass for a contribution
                others = [p for p in prefixes if p is not prefix]
                without = run(others)[0]
                layer.observer(branch, run(prefixes)[0] - without, without)
    return run(prefixes, dropout)


AttentionInterface.register(NAME, attend)


def _attention(
    module: nn.Module,
    prefixes: Sequence[Prefix],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Output:
    """Attention with these prefixes; see `attend`."""
    compute, is_sdpa = _implementation(module)
    shown = [p for p in prefixes if isinstance(p[2].gate, Tensor) or p[2].gate != 0.0]
    if not shown:
        return compute(module, query, key, value, mask, **kwargs)
    if is_sdpa and mask is None and _is_causal(module, query, kwargs):
        # Only then may sdpa see more keys than tokens: the empty end of a static cache.
        n = query.shape[2]
        key, value = key[:, :, :n], value[:, :, :n]
        mask = query.new_ones(1, 1, n, n, dtype=torch.bool).tril()
    tokens = torch.cat([_tokens(p, key, value) for p in shown], 2)  # (2, H_kv, R, d)
    keys, values = tokens[:, None].expand(-1, len(key), -1, -1, -1)
    n_tokens, n_keys = tokens.shape[2], key.shape[2]
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = F.pad(bias[..., :n_keys], (n_tokens, 0))
    output, weights = compute(
        module,
        query,
        torch.cat([keys.to(key.dtype), key], 2),
        torch.cat([values.to(value.dtype), value], 2),
        _widened(mask, [p[2] for p in shown], query, n_keys),
        **kwargs,
    )
    return output, None if weights is None else weights[..., n_tokens:]


def _tokens(prefix: Prefix, key: Tensor, value: Tensor) -> Tensor:
    """Keys and values of a prefix by heads, (2, H_kv, R, d)."""
    layer, adapter, branch = prefix
    params = layer.params(adapter, branch.kind.name)
    both = branch.kind.delta(params, key, value, branch.scaling, layer, "attention")
    if both.shape[-1] != key.shape[1] * key.shape[3]:
        raise SiteError(
            f"the prefix at {branch.site.path} is {both.shape[-1]} wide, the keys of its attention "
            f"{key.shape[1]} x {key.shape[3]}. Use other kinds on this model."
        )
    return both.unflatten(-1, (key.shape[1], key.shape[3])).transpose(1, 2)


def _widened(
    mask: Tensor | None, branches: Sequence[Branch], query: Tensor, n_keys: int
) -> Tensor | None:
    """The mask with columns for the prefixes before the others: the logarithm of their gates."""
    if any(b.is_gated for b in branches):
        additive = query.new_zeros(1, 1, 1, n_keys)
        if mask is not None and mask.dtype == torch.bool:
            mask = additive.masked_fill(~mask, torch.finfo(query.dtype).min)
        mask = additive if mask is None else mask
    if mask is None:
        return None
    gates = torch.cat([torch.as_tensor(b.gate).to(mask).expand(b.size) for b in branches])
    columns = gates if mask.dtype == torch.bool else gates.log()
    return torch.cat([columns.expand(*mask.shape[:-1], -1), mask], -1)


def _layers(module: nn.Module) -> Iterator[UnionLayer]:
    return (child for child in module.children() if isinstance(child, UnionLayer))


def _implementation(module: nn.Module) -> tuple[Callable[..., Output], bool]:
    """What computes this attention without prefixes, and whether that is sdpa."""
    name = getattr(module, _OWN, module.config)._attn_implementation
    known = inspect.unwrap(type(module).forward).__globals__
    if name == "sdpa":
        return known["ALL_ATTENTION_FUNCTIONS"]["sdpa"], True
    if name in ("eager", None):
        return known["eager_attention_forward"], False
    raise ConfigError(
        f"a prefix needs the attention implementation sdpa or eager; this model runs {name!r}. "
        "Load it with attn_implementation='sdpa', or use other kinds."
    )


def _is_causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa masks later tokens when it gets no mask."""
    given = kwargs.get("is_causal")
    return query.shape[2] > 1 and (getattr(module, "is_causal", True) if given is None else given)
