import pytest
import torch
from transformers import AutoConfig, AutoModel

from prunepeft.sites import count_base_params, find_sites
from tests.tiny_models import LAYERS, TINY, make_tiny, tiny_inputs

# Rows: block, role, path (* = layer), d_in, d_out, source; in model order.
BERT = """
attention q    encoder.layer.*.attention.self.query   16 16 -
attention k    encoder.layer.*.attention.self.key     16 16 -
attention v    encoder.layer.*.attention.self.value   16 16 -
attention o    encoder.layer.*.attention.output.dense 16 16 encoder.layer.*.attention.self.query
attention norm encoder.layer.*.attention.output.LayerNorm 16 16 -
ffn       up   encoder.layer.*.intermediate.dense     16 32 -
ffn       down encoder.layer.*.output.dense           32 16 encoder.layer.*.intermediate.dense
ffn       norm encoder.layer.*.output.LayerNorm       16 16 -
"""
DEBERTA = """
attention q    encoder.layer.*.attention.self.query_proj 16 16 -
attention k    encoder.layer.*.attention.self.key_proj   16 16 -
attention v    encoder.layer.*.attention.self.value_proj 16 16 -
attention o    encoder.layer.*.attention.output.dense    16 16 \
 encoder.layer.*.attention.self.value_proj
attention norm encoder.layer.*.attention.output.LayerNorm 16 16 -
ffn       up   encoder.layer.*.intermediate.dense        16 32 -
ffn       down encoder.layer.*.output.dense              32 16 encoder.layer.*.intermediate.dense
ffn       norm encoder.layer.*.output.LayerNorm          16 16 -
"""
DISTILBERT = """
attention q    transformer.layer.*.attention.q_lin   16 16 -
attention k    transformer.layer.*.attention.k_lin   16 16 -
attention v    transformer.layer.*.attention.v_lin   16 16 -
attention o    transformer.layer.*.attention.out_lin 16 16 transformer.layer.*.attention.q_lin
attention norm transformer.layer.*.sa_layer_norm     16 16 -
ffn       up   transformer.layer.*.ffn.lin1          16 32 -
ffn       down transformer.layer.*.ffn.lin2          32 16 transformer.layer.*.ffn.lin1
ffn       norm transformer.layer.*.output_layer_norm 16 16 -
"""
GPT2 = """
attention norm      h.*.ln_1        16 16 -
attention fused_qkv h.*.attn.c_attn 16 48 -
attention o         h.*.attn.c_proj 16 16 h.*.attn.c_attn
ffn       norm      h.*.ln_2        16 16 -
ffn       up        h.*.mlp.c_fc    16 32 -
ffn       down      h.*.mlp.c_proj  32 16 h.*.mlp.c_fc
"""
OPT = """
attention k    decoder.layers.*.self_attn.k_proj   16 16 -
attention v    decoder.layers.*.self_attn.v_proj   16 16 -
attention q    decoder.layers.*.self_attn.q_proj   16 16 -
attention o    decoder.layers.*.self_attn.out_proj 16 16 decoder.layers.*.self_attn.q_proj
attention norm decoder.layers.*.self_attn_layer_norm 16 16 -
ffn       up   decoder.layers.*.fc1                16 32 -
ffn       down decoder.layers.*.fc2                32 16 decoder.layers.*.fc1
ffn       norm decoder.layers.*.final_layer_norm   16 16 -
"""
LLAMA = """
attention q    layers.*.self_attn.q_proj 16 16 -
attention k    layers.*.self_attn.k_proj 16 8  -
attention v    layers.*.self_attn.v_proj 16 8  -
attention o    layers.*.self_attn.o_proj 16 16 layers.*.self_attn.q_proj
ffn       gate layers.*.mlp.gate_proj    16 32 -
ffn       up   layers.*.mlp.up_proj      16 32 -
ffn       down layers.*.mlp.down_proj    32 16 layers.*.mlp.up_proj
"""
WIDE_HEADS = """
attention q    layers.*.self_attn.q_proj 16 32 -
attention k    layers.*.self_attn.k_proj 16 16 -
attention v    layers.*.self_attn.v_proj 16 16 -
attention o    layers.*.self_attn.o_proj 32 16 layers.*.self_attn.q_proj
ffn       gate layers.*.mlp.gate_proj    16 32 -
ffn       up   layers.*.mlp.up_proj      16 32 -
ffn       down layers.*.mlp.down_proj    32 16 layers.*.mlp.up_proj
"""
PRE_NORMS = """
attention norm layers.*.input_layernorm          16 16 -
ffn       norm layers.*.post_attention_layernorm 16 16 -
"""
HEAD_NORMS = """
attention norm layers.*.self_attn.q_norm 8 8 -
attention norm layers.*.self_attn.k_norm 8 8 -
"""
SANDWICH_NORMS = """
attention norm layers.*.input_layernorm            16 16 -
attention norm layers.*.post_attention_layernorm   16 16 -
ffn       norm layers.*.pre_feedforward_layernorm  16 16 -
ffn       norm layers.*.post_feedforward_layernorm 16 16 -
"""
VIT = """
attention q    layers.*.attention.q_proj 16 16 -
attention k    layers.*.attention.k_proj 16 16 -
attention v    layers.*.attention.v_proj 16 16 -
attention o    layers.*.attention.o_proj 16 16 layers.*.attention.q_proj
attention norm layers.*.layernorm_before 16 16 -
ffn       norm layers.*.layernorm_after  16 16 -
ffn       up   layers.*.mlp.fc1          16 32 -
ffn       down layers.*.mlp.fc2          32 16 layers.*.mlp.fc1
"""
T5_SELF = """
attention q {s}.block.*.layer.0.SelfAttention.q 16 16 -
attention k {s}.block.*.layer.0.SelfAttention.k 16 16 -
attention v {s}.block.*.layer.0.SelfAttention.v 16 16 -
attention o {s}.block.*.layer.0.SelfAttention.o 16 16 {s}.block.*.layer.0.SelfAttention.q
attention norm {s}.block.*.layer.0.layer_norm 16 16 -
"""
T5_CROSS = """
cross_attention q decoder.block.*.layer.1.EncDecAttention.q 16 16 -
cross_attention k decoder.block.*.layer.1.EncDecAttention.k 16 16 -
cross_attention v decoder.block.*.layer.1.EncDecAttention.v 16 16 -
cross_attention o decoder.block.*.layer.1.EncDecAttention.o 16 16 \
 decoder.block.*.layer.1.EncDecAttention.q
cross_attention norm decoder.block.*.layer.1.layer_norm 16 16 -
"""
T5_FFN = """
ffn up   {f}.DenseReluDense.wi 16 32 -
ffn down {f}.DenseReluDense.wo 32 16 {f}.DenseReluDense.wi
ffn norm {f}.layer_norm        16 16 -
"""
T5_GATED = """
ffn gate {f}.DenseReluDense.wi_0 16 32 -
ffn up   {f}.DenseReluDense.wi_1 16 32 -
ffn down {f}.DenseReluDense.wo   32 16 {f}.DenseReluDense.wi_1
ffn norm {f}.layer_norm          16 16 -
"""


def t5(ffn):
    encoder = T5_SELF.format(s="encoder") + ffn.format(f="encoder.block.*.layer.1")
    decoder = T5_SELF.format(s="decoder") + T5_CROSS
    decoder += ffn.format(f="decoder.block.*.layer.2")
    return {"encoder": encoder, "decoder": decoder}


def with_head_norms(table):
    """The attention ends before the feed-forward begins."""
    attention, ffn, rest = table.partition("ffn ")
    return attention + HEAD_NORMS.lstrip() + ffn + rest


# name -> stack -> table
EXPECTED = {
    "bert": {"encoder": BERT},
    "roberta": {"encoder": BERT},
    "deberta_v2": {"encoder": DEBERTA},
    "distilbert": {"encoder": DISTILBERT},
    "gpt2": {"decoder": GPT2},
    "opt": {"decoder": OPT},
    "llama": {"decoder": LLAMA + PRE_NORMS},
    "mistral": {"decoder": LLAMA + PRE_NORMS},
    "qwen2": {"decoder": LLAMA + PRE_NORMS},
    "qwen3": {"decoder": with_head_norms(WIDE_HEADS) + PRE_NORMS},
    "gemma": {"decoder": WIDE_HEADS + PRE_NORMS},
    "gemma2": {"decoder": WIDE_HEADS + SANDWICH_NORMS},
    "gemma3": {"decoder": with_head_norms(WIDE_HEADS) + SANDWICH_NORMS},
    "t5": t5(T5_FFN),
    "t5_gated": t5(T5_GATED),
    "vit": {"encoder": VIT},
    "deit": {"encoder": VIT},
}
# Roles whose layers have a bias; in the other models every layer has one.
WITHOUT_BIASES = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "t5", "t5_gated")
BIASES = {"qwen2": ("q", "k", "v")} | dict.fromkeys(WITHOUT_BIASES, ())
PREFIX = {
    "bert": "bert.",
    "roberta": "roberta.",
    "deberta_v2": "deberta.",
    "distilbert": "distilbert.",
    "gpt2": "transformer.",
    "t5": "",
    "t5_gated": "",
    "vit": "vit.",
    "deit": "deit.",
}


def expected_rows(name, prefix=""):
    rows = []
    for stack, table in EXPECTED[name].items():
        for layer in range(LAYERS):
            for line in filter(None, table.splitlines()):
                block, role, path, d_in, d_out, source = line.replace("*", str(layer)).split()
                source = "" if source == "-" else prefix + source
                rows.append(
                    (prefix + path, stack, layer, block, role, int(d_in), int(d_out), source)
                )
    return rows


def rows_of(sites):
    return [(s.path, s.stack, s.layer, s.block, s.role, s.d_in, s.d_out, s.source) for s in sites]


def test_every_tiny_model_has_a_table():
    assert set(EXPECTED) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_sites_of_a_bare_model_are_exact(name, caplog):
    model = TINY[name](head="base")
    sites = find_sites(model)
    assert rows_of(sites) == expected_rows(name)
    assert {s.n_layers for s in sites} == {LAYERS}
    assert caplog.text == ""


@pytest.mark.parametrize("name", TINY)
def test_a_task_head_adds_a_prefix_and_no_site(name):
    prefix = PREFIX.get(name, "model.")
    assert rows_of(find_sites(TINY[name]())) == expected_rows(name, prefix)


@pytest.mark.parametrize("name", TINY)
def test_sites_know_which_layers_have_a_bias(name):
    sites = find_sites(TINY[name](head="base"))
    with_bias = {s.path for s in sites if s.has_bias}
    assert with_bias == {s.path for s in sites if s.role in BIASES.get(name, (s.role,))}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_the_class_of_the_head_does_not_matter(name):
    as_classifier = find_sites(TINY[name](head="seq-cls"))
    assert as_classifier == find_sites(TINY[name](head="causal-lm"))


@pytest.mark.parametrize("name", TINY)
def test_meta_device_gives_the_same_sites(name):
    with torch.device("meta"):
        empty = TINY[name]()
    assert all(p.is_meta for p in empty.parameters())
    assert find_sites(empty) == find_sites(TINY[name]())
    assert count_base_params(empty) == count_base_params(TINY[name]())


@pytest.mark.parametrize("name", TINY)
def test_sources_read_what_the_sub_layer_reads(name):
    """The source sees one input per forward pass, of the width the sub-layer writes."""
    model = TINY[name]()
    seen = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, args, _output, path=path: seen.setdefault(path, []).append(args)
        )
    with torch.no_grad():
        model(**tiny_inputs(name, model))
    checked = [s for s in find_sites(model) if s.role in ("o", "down")]
    for site in checked:
        assert len(seen[site.source]) == 1, site
        assert seen[site.source][0][0].shape[-1] == site.d_out
    assert len(checked) == 2 * LAYERS if not name.startswith("t5") else 5 * LAYERS


def test_deberta_with_its_own_position_layers(caplog):
    sites = find_sites(make_tiny("deberta_v2", share_att_key=False))
    extra = [s for s in sites if s.role == "other"]
    assert [s.path.rpartition(".")[2] for s in extra] == ["pos_key_proj", "pos_query_proj"] * 2
    assert {s.block for s in extra} == {"attention"}
    assert caplog.text == ""


def test_gpt2_as_a_decoder_has_cross_attention():
    config = AutoConfig.for_model(
        "gpt2", vocab_size=8, n_embd=8, n_layer=2, n_head=2, add_cross_attention=True
    )
    with torch.device("meta"):
        sites = find_sites(AutoModel.from_config(config))
    cross = [s for s in sites if s.block == "cross_attention" and s.layer == 1]
    assert [(s.path, s.role, s.source) for s in cross] == [
        ("h.1.crossattention.c_attn", "other", ""),
        ("h.1.crossattention.q_attn", "q", ""),
        ("h.1.crossattention.c_proj", "o", "h.1.crossattention.q_attn"),
        ("h.1.ln_cross_attn", "norm", ""),
    ]


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
DENSE_ROLES = {"q", "k", "v", "o", "up", "down", "norm"}
MORE_FAMILIES = {
    "electra": (SMALL, DENSE_ROLES),
    "xlm-roberta": (SMALL, DENSE_ROLES),
    "mpnet": (SMALL, DENSE_ROLES),
    "modernbert": (SMALL, {"fused_qkv", "o", "fused_gate_up", "down", "norm"}),
    "gpt_neox": (SMALL, {"fused_qkv", "o", "up", "down", "norm"}),
    "phi": (SMALL, DENSE_ROLES),
    "phi3": (SMALL, {"fused_qkv", "o", "fused_gate_up", "down", "norm"}),
    "bloom": (
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        {"fused_qkv", "o", "up", "down", "norm"},
    ),
    "starcoder2": (SMALL | {"num_key_value_heads": 2}, DENSE_ROLES),
    "olmo": (SMALL, DENSE_ROLES - {"norm"} | {"gate"}),  # its norms have no weight
    "olmo2": (SMALL, DENSE_ROLES | {"gate"}),
    "cohere": (SMALL, DENSE_ROLES | {"gate"}),
    "granite": (SMALL, DENSE_ROLES | {"gate"}),
    "stablelm": (SMALL, DENSE_ROLES | {"gate"}),
    "dinov2": (SMALL | {"image_size": 8, "patch_size": 4}, DENSE_ROLES),
    "bart": (
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        DENSE_ROLES,
    ),
}


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_other_listed_families_are_complete(family, caplog):
    settings, roles = MORE_FAMILIES[family]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    caplog.clear()
    sites = find_sites(model)
    assert {s.role for s in sites} == roles
    assert all(s.source for s in sites if s.role in ("o", "down"))
    assert caplog.text == ""


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_seeded_and_finite(name):
    one, two, other = TINY[name](), TINY[name](), TINY[name](seed=1)
    with torch.no_grad():
        a, b, c = (m(**tiny_inputs(name, m))[0] for m in (one, two, other))
    assert torch.isfinite(a).all()
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
