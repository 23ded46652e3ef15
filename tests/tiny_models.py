"""Random two-layer models of every family the library must know, and inputs for them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VOCAB, HIDDEN, FFN, LAYERS, HEADS, IMAGE = 64, 16, 32, 2, 4, 8
HEAD_CLASSES = {
    "base": AutoModel,
    "seq-cls": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "image-cls": AutoModelForImageClassification,
}

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = _TOKENS | _SIZES | _NO_DROPOUT | {"max_position_embeddings": 32}
_LLAMA = _TOKENS | _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 32}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": HIDDEN,
}
_DISTILBERT = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": FFN,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "max_position_embeddings": 32,
}
_GPT2 = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": FFN,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = {"ffn_dim": FFN, "word_embed_proj_dim": 8, "dropout": 0.0, "attention_dropout": 0.0}
_T5 = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "d_model": HIDDEN,
    "d_kv": 4,
    "d_ff": FFN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
}
_VIT = _SIZES | _NO_DROPOUT | {"image_size": IMAGE, "patch_size": 4}
_DEIT = _VIT | {"architectures": []}  # its Auto class is one of two and looks here

# name -> (model type, configuration, default head)
_TABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", _BERT, "seq-cls"),
    "roberta": ("roberta", _BERT | {"max_position_embeddings": 34}, "seq-cls"),
    "deberta_v2": ("deberta-v2", _BERT | _DEBERTA, "seq-cls"),
    "distilbert": ("distilbert", _TOKENS | _DISTILBERT, "seq-cls"),
    "gpt2": ("gpt2", _TOKENS | _GPT2, "causal-lm"),
    "opt": ("opt", _TOKENS | _SIZES | _OPT | {"max_position_embeddings": 32}, "causal-lm"),
    "llama": ("llama", _LLAMA, "causal-lm"),
    "mistral": ("mistral", _LLAMA, "causal-lm"),
    "qwen2": ("qwen2", _LLAMA, "causal-lm"),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}, "causal-lm"),
    "gemma": ("gemma", _LLAMA | {"head_dim": 8}, "causal-lm"),
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 8}, "causal-lm"),
    "gemma3": ("gemma3_text", _LLAMA | {"head_dim": 8}, "causal-lm"),
    "t5": ("t5", _T5, "seq2seq"),
    "t5_gated": ("t5", _T5 | {"feed_forward_proj": "gated-gelu"}, "seq2seq"),
    "vit": ("vit", _VIT, "image-cls"),
    "deit": ("deit", _DEIT, "image-cls"),
}

_BART = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "dropout": 0.0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_PLAIN = _TOKENS | _SIZES | {"max_position_embeddings": 32}
_NO_HIDDEN_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
# More families, for tests that need many names of layers.
_MORE: dict[str, tuple[str, dict[str, Any], str]] = {
    "xlm_roberta": ("xlm-roberta", _BERT | {"max_position_embeddings": 34}, "seq-cls"),
    "camembert": ("camembert", _BERT | {"max_position_embeddings": 34}, "seq-cls"),
    "electra": ("electra", _BERT | {"embedding_size": 8}, "seq-cls"),
    "bart": ("bart", _TOKENS | _BART | {"max_position_embeddings": 32}, "seq2seq"),
    "mpnet": ("mpnet", _BERT | {"max_position_embeddings": 34}, "seq-cls"),
    "modernbert": ("modernbert", _PLAIN | {"sep_token_id": 2, "cls_token_id": 1}, "seq-cls"),
    "phi": ("phi", _PLAIN | {"resid_pdrop": 0.0}, "causal-lm"),
    "phi3": ("phi3", _LLAMA | {"resid_pdrop": 0.0}, "causal-lm"),
    "gpt_neox": ("gpt_neox", _PLAIN | _NO_HIDDEN_DROPOUT, "causal-lm"),
    "bloom": ("bloom", _PLAIN | {"n_layer": LAYERS, "n_head": HEADS}, "causal-lm"),
    "starcoder2": ("starcoder2", _LLAMA | {"residual_dropout": 0.0}, "causal-lm"),
    "olmo2": ("olmo2", _LLAMA, "causal-lm"),
    "granite": ("granite", _LLAMA, "causal-lm"),
}


def make_tiny(
    name: str, head: str | None = None, *, seed: int = 0, n_labels: int = 3, **overrides: Any
) -> PreTrainedModel:
    """Build a random model in float32, in evaluation mode.

    Every tensor, biases and norms too, is random, so that nothing cancels by being zero or one.

    Args:
        name: A key of `TINY` or `MORE`.
        head: A key of `HEAD_CLASSES`; the family's usual one when not given.
        seed: Fixes all weights; the global generator is left alone.
        n_labels: Classes of a classification head.
        overrides: Fields of the configuration.
    """
    model_type, settings, default = (_TABLE | _MORE)[name]
    config = AutoConfig.for_model(model_type, **(settings | {"num_labels": n_labels} | overrides))
    with torch.random.fork_rng(devices=[]):
        model = HEAD_CLASSES[head or default].from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.is_meta:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.15 * noise if tensor.ndim > 1 else tensor + 0.05 * noise)
    return model


TINY: dict[str, Callable[..., PreTrainedModel]] = {
    name: partial(make_tiny, name) for name in _TABLE
}
MORE: dict[str, Callable[..., PreTrainedModel]] = {name: partial(make_tiny, name) for name in _MORE}


def tiny_inputs(
    name: str, model: PreTrainedModel, batch: int = 2, seq: int = 6, *, seed: int = 0
) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass; the last row of text is padded on the right by two."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        shape = (batch, model.config.num_channels, IMAGE, IMAGE)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.device)}
    ids = torch.randint(3, VOCAB, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, seq - 2 :] = 0
    mask[-1, seq - 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 4), generator=generator)
    return {key: value.to(model.device) for key, value in inputs.items()}
