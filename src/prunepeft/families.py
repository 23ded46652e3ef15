"""How transformer families name their layers. The only file that knows module names."""

import re
from collections.abc import Mapping
from typing import NamedTuple

Names = Mapping[str, tuple[str, str]]  # path inside the repeated block -> (block, role)


class Stack(NamedTuple):
    """How a family names one of its stacks: where the list of blocks is and what is inside a block.

    `attention_source` is the role whose layer reads the hidden states and nothing else.
    """

    stack: str
    layers: str
    names: Names
    attention_source: str = "q"


def _names(block: str, prefix: str, **roles: str) -> dict[str, tuple[str, str]]:
    return {prefix + name: (block, role) for role, name in roles.items()}


def _attention(prefix: str, o: str = "o_proj", block: str = "attention") -> Names:
    return _names(block, prefix, q="q_proj", k="k_proj", v="v_proj", o=o)


def _bert(prefix: str, block: str) -> Names:
    attention = _names(block, prefix, q="self.query", k="self.key", v="self.value")
    return attention | _names(block, prefix, o="output.dense", norm="output.LayerNorm")


def _norms(attention: str, ffn: str) -> Names:
    """The normalisation layers before or after each sub-layer, or inside it."""
    where = {"attention": attention, "ffn": ffn}
    return {name: (block, "norm") for block, names in where.items() for name in names.split()}


_GATED = _names("ffn", "mlp.", up="up_proj", gate="gate_proj", down="down_proj")
_FUSED_GATED = _names("ffn", "mlp.", fused_gate_up="gate_up_proj", down="down_proj")
_PLAIN = _names("ffn", "mlp.", up="fc1", down="fc2")
_GPT_MLP = _names("ffn", "mlp.", up="c_fc", down="c_proj")
_WIDE = _names("ffn", "mlp.", up="dense_h_to_4h", down="dense_4h_to_h")
_BERT_FFN = _names("ffn", "", up="intermediate.dense", down="output.dense", norm="output.LayerNorm")
_PRE_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_QK_NORMS = _norms("self_attn.q_norm self_attn.k_norm", "")

_BERT = {
    **_bert("attention.", "attention"),
    **_bert("crossattention.", "cross_attention"),
    **_BERT_FFN,
}
_DEBERTA = {
    **_names("attention", "attention.self.", q="query_proj", k="key_proj", v="value_proj"),
    **_names("attention", "attention.", o="output.dense", norm="output.LayerNorm"),
    **_names("attention", "attention.self.pos_", other="key_proj"),
    **_names("attention", "attention.self.pos_", other="query_proj"),
    **_BERT_FFN,
}
_MPNET = {
    **_names("attention", "attention.attn.", q="q", k="k", v="v", o="o"),
    **_names("attention", "attention.", norm="LayerNorm"),
    **_BERT_FFN,
}
_DISTILBERT = {
    **_names("attention", "attention.", q="q_lin", k="k_lin", v="v_lin", o="out_lin"),
    **_names("ffn", "ffn.", up="lin1", down="lin2"),
    **_norms("sa_layer_norm", "output_layer_norm"),
}
_MODERNBERT = {
    **_names("attention", "attn.", fused_qkv="Wqkv", o="Wo"),
    **_names("ffn", "mlp.", fused_gate_up="Wi", down="Wo"),
    **_norms("attn_norm", "mlp_norm"),
}
_GPT2 = {
    **_names("attention", "attn.", fused_qkv="c_attn", o="c_proj"),
    **_names("cross_attention", "crossattention.", q="q_attn", other="c_attn", o="c_proj"),
    **_names("cross_attention", "", norm="ln_cross_attn"),
    **_GPT_MLP,
    **_norms("ln_1", "ln_2"),
}
_BART = {
    **_attention("self_attn.", "out_proj"),
    **_attention("encoder_attn.", "out_proj", "cross_attention"),
    **_names("ffn", "", up="fc1", down="fc2"),
    **_norms("self_attn_layer_norm", "final_layer_norm"),
    **_names("cross_attention", "", norm="encoder_attn_layer_norm"),
}
_LLAMA = {**_attention("self_attn."), **_GATED, **_PRE_NORMS, **_QK_NORMS}
# Here post_attention_layernorm does follow the attention; elsewhere it opens the feed-forward.
_SANDWICH = {
    **_LLAMA,
    **_norms("post_attention_layernorm", "pre_feedforward_layernorm post_feedforward_layernorm"),
}
_STARCODER = {**_attention("self_attn."), **_GPT_MLP, **_PRE_NORMS}
_PHI = {
    **_attention("self_attn.", "dense"),
    **_PLAIN,
    **_norms("input_layernorm self_attn.q_layernorm self_attn.k_layernorm", ""),
}
_PHI3 = {
    **_names("attention", "self_attn.", fused_qkv="qkv_proj", o="o_proj"),
    **_FUSED_GATED,
    **_PRE_NORMS,
}
_NEOX = {
    **_names("attention", "attention.", fused_qkv="query_key_value", o="dense"),
    **_WIDE,
    **_PRE_NORMS,
}
_BLOOM = {
    **_names("attention", "self_attention.", fused_qkv="query_key_value", o="dense"),
    **_WIDE,
    **_PRE_NORMS,
}
_VIT = {
    **_attention("attention."),
    **_PLAIN,
    **_norms("layernorm_before norm1", "layernorm_after norm2"),
    # transformers before 5.9
    **_names("attention", "attention.attention.", q="query", k="key", v="value"),
    **_names("attention", "attention.", o="output.dense"),
    **_BERT_FFN,
}


def _t5(ffn_index: int) -> Names:
    ffn = f"layer.{ffn_index}.DenseReluDense."
    return {
        **_names("attention", "layer.0.SelfAttention.", q="q", k="k", v="v", o="o"),
        **_names("cross_attention", "layer.1.EncDecAttention.", q="q", k="k", v="v", o="o"),
        **_names("ffn", ffn, up="wi", down="wo"),
        **_names("ffn", ffn, gate="wi_0", up="wi_1"),  # act(wi_0 x) * (wi_1 x)
        **_names("attention", "layer.0.", norm="layer_norm"),
        **_names("cross_attention", "layer.1.", norm="layer_norm"),
        **_names("ffn", f"layer.{ffn_index}.", norm="layer_norm"),  # layer 1 in an encoder
    }


def _family(names: str, *stacks: Stack) -> dict[str, tuple[Stack, ...]]:
    return dict.fromkeys(names.split(), stacks)


# Family (model_type of the config) -> its stacks.
FAMILIES: Mapping[str, tuple[Stack, ...]] = {
    **_family(
        "bert roberta xlm-roberta camembert electra", Stack("encoder", "encoder.layer", _BERT)
    ),
    **_family("mpnet", Stack("encoder", "encoder.layer", _MPNET)),
    # Its query and key layers may also project the relative positions, so value is the source.
    **_family("deberta-v2", Stack("encoder", "encoder.layer", _DEBERTA, attention_source="v")),
    **_family("distilbert", Stack("encoder", "transformer.layer", _DISTILBERT)),
    **_family("modernbert", Stack("encoder", "layers", _MODERNBERT)),
    **_family(
        "vit deit dinov2",
        Stack("encoder", "layers", _VIT),
        Stack("encoder", "encoder.layer", _VIT),
    ),
    **_family("gpt2", Stack("decoder", "h", _GPT2)),
    **_family("bloom", Stack("decoder", "h", _BLOOM)),
    **_family("opt", Stack("decoder", "decoder.layers", _BART)),
    **_family(
        "llama mistral qwen2 qwen3 gemma olmo cohere granite stablelm",
        Stack("decoder", "layers", _LLAMA),
    ),
    **_family("gemma2 gemma3_text olmo2", Stack("decoder", "layers", _SANDWICH)),
    **_family("starcoder2", Stack("decoder", "layers", _STARCODER)),
    **_family("gpt_neox", Stack("decoder", "layers", _NEOX)),
    **_family("phi", Stack("decoder", "layers", _PHI)),
    **_family("phi3", Stack("decoder", "layers", _PHI3)),
    **_family(
        "t5 mt5",
        Stack("encoder", "encoder.block", _t5(1)),
        Stack("decoder", "decoder.block", _t5(2)),
    ),
    **_family(
        "bart mbart",
        Stack("encoder", "encoder.layers", _BART),
        Stack("decoder", "decoder.layers", _BART),
    ),
}

# Names that say the role in a family that is not listed; the first match wins.
_ROLE_PATTERNS = (
    ("fused_qkv", r"w?qkv(_.*)?|query_key_value|c_attn|in_proj"),
    ("fused_gate_up", r"gate_up.*|up_gate.*"),
    ("q", r"(.*_)?(w?q|query)(_.*)?"),
    ("k", r"(.*_)?(w?k|key)(_.*)?"),
    ("v", r"(.*_)?(w?v|value)(_.*)?"),
    ("gate", r"(gate|w_?gate)_.*|w_?gate|wi_0"),
    ("up", r"up(_.*)?|(fc|lin|linear)_?1|fc_in|c_fc|wi(_1)?|intermediate|dense_h_to_4h"),
    ("down", r"down(_.*)?|(fc|lin|linear)_?2|fc_out|dense_4h_to_h"),
    ("o", r"w?o(_.*)?|out(_.*)?|output"),
)
_GENERIC = re.compile(r"dense|linear|lin|proj|fc|layer|\d+")


def guess_role(name: str) -> tuple[str, str]:
    """Block and role that the path of a linear layer inside its block says, else role `other`."""
    parts = [p.lower() for p in name.split(".")]
    while len(parts) > 1 and _GENERIC.fullmatch(parts[-1]):
        parts.pop()
    role = next((r for r, pattern in _ROLE_PATTERNS if re.fullmatch(pattern, parts[-1])), "other")
    if re.search(r"cross|enc_?dec|encoder_att", name.lower()):
        block = "cross_attention"
    elif re.search(r"attn|attention", name.lower()) or role in ("q", "k", "v", "fused_qkv"):
        block = "attention"
    else:
        block = "ffn"
    if role == "o" and block == "ffn":
        role = "down"
    return block, role
