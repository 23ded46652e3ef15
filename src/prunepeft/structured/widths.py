"""What a stock config can say about a cut: one width for all layers."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group

# Model type -> field with the number of neurons; by stack where the stacks have one each.
_NEURONS: dict[str, str | dict[str, str]] = {
    **dict.fromkeys(
        "bert roberta xlm-roberta camembert electra deberta-v2 mpnet modernbert vit deit llama "
        "mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 cohere granite stablelm "
        "starcoder2 gpt_neox phi phi3".split(),
        "intermediate_size",
    ),
    "distilbert": "hidden_dim",
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    **dict.fromkeys(("t5", "mt5"), "d_ff"),
    "bart": {"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"},
    "mbart": {"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"},
}
# Those whose config has a width of the head apart from the hidden width.
_GROUPED_HEADS = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text".split()
_T5_HEADS = ("t5", "mt5")


def express(config: PreTrainedConfig, groups: Sequence[Group], cut: Cut) -> bool:
    """Whether the stock config can say this cut; if so the config is edited in place.

    It can where every layer keeps the same number of units and the config has fields for it: the
    width of the feed-forward in nearly every family, heads where the width of a head has a field
    of its own (LLaMA-like, T5). BERT, GPT-2, OPT, BART, DistilBERT and ViT divide the hidden width
    by the number of heads, so they cannot say fewer heads of the same width.

    Args:
        config: The model's config.
        groups: All groups that `find_groups` gave before the cut.
        cut: What stays.
    """
    edits = _edits(config, groups, cut)
    if edits is None or not _is_valid(config, edits):
        return False
    for name, value in edits.items():
        setattr(config, name, value)
    return True


def _edits(config: PreTrainedConfig, groups: Sequence[Group], cut: Cut) -> dict[str, int] | None:
    """Field -> new value; None if the config cannot say it."""
    edits: dict[str, int] = {}
    for what in ("heads", "neurons"):
        own = [g for g in groups if g.what == what]
        if all(len(cut.keep.get(g.id, range(g.n_units))) == g.n_units for g in own):
            continue
        for group in own:
            new = _fields(config, group, len(cut.keep.get(group.id, range(group.n_units))))
            if not new or any(edits.get(name, value) != value for name, value in new.items()):
                return None
            edits |= new
    return edits


def _fields(config: PreTrainedConfig, group: Group, n: int) -> dict[str, int]:
    """Fields that say n units in a group; empty if there are none."""
    kind = config.model_type
    if group.what == "neurons":
        name = _NEURONS.get(kind)
        name = name.get(group.stack) if isinstance(name, dict) else name
        return {name: n} if name and n else {}
    if kind in _T5_HEADS:
        return {"num_heads": n}
    if kind not in _GROUPED_HEADS:
        return {}
    head_dim = group.parts[1].segments[0][1]  # of the keys
    return {
        "num_attention_heads": n * group.heads_per_unit,
        "num_key_value_heads": n,
        "head_dim": head_dim,
    }


def _is_valid(config: PreTrainedConfig, edits: dict[str, Any]) -> bool:
    """Whether a config with these values can be built; some want a hidden width that divides."""
    try:
        made = type(config).from_dict(copy.deepcopy(config.to_dict()) | edits)
    except Exception:  # the checks of configs raise errors of several libraries
        return False
    return all(getattr(made, name, None) == value for name, value in edits.items())
