"""Which heads and neurons of a model are found, and how much they hold."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from prunepeft.errors import SiteError
from prunepeft.sites import count_base_params
from prunepeft.structured import Part, apply_cut, choose_units, find_groups, removed_params
from tests.tiny_models import MORE, TINY


def on_meta(config):
    with torch.device("meta"):
        return AutoModel.from_config(config)


def find(name, **overrides):
    return {g.id: g for g in find_groups((TINY | MORE)[name](**overrides))}


def test_groups_of_bert():
    groups = find("bert")
    assert list(groups) == [
        "encoder.0.attention",
        "encoder.0.ffn",
        "encoder.1.attention",
        "encoder.1.ffn",
    ]
    heads, neurons = groups["encoder.1.attention"], groups["encoder.1.ffn"]
    assert (heads.what, heads.stack, heads.layer, heads.block) == (
        "heads",
        "encoder",
        1,
        "attention",
    )
    assert (heads.n_units, heads.heads_per_unit) == (4, 1)
    assert heads.unit_params == 4 * 16 * 4 + 3 * 4
    at = "bert.encoder.layer.1."
    assert heads.parts == (
        Part(f"{at}attention.self.query", "out", ((0, 4),)),
        Part(f"{at}attention.self.key", "out", ((0, 4),)),
        Part(f"{at}attention.self.value", "out", ((0, 4),)),
        Part(f"{at}attention.output.dense", "in", ((0, 4),)),
    )
    assert (neurons.what, neurons.n_units, neurons.unit_params) == ("neurons", 32, 2 * 16 + 1)
    assert [(p.path.removeprefix(at), p.side) for p in neurons.parts] == [
        ("intermediate.dense", "out"),
        ("output.dense", "in"),
    ]


def test_a_fused_layer_has_one_run_of_units_for_each_of_its_parts():
    qkv, o = find("gpt2")["decoder.0.attention"].parts
    assert qkv.segments == ((0, 4), (16, 4), (32, 4))
    assert o.segments == ((0, 4),)
    assert qkv.features([0, 2]).tolist() == [
        *(0, 1, 2, 3, 8, 9, 10, 11),
        *(16, 17, 18, 19, 24, 25, 26, 27),
        *(32, 33, 34, 35, 40, 41, 42, 43),
    ]
    gate_up = find("phi3")["decoder.1.ffn"].parts[0]
    assert gate_up.segments == ((0, 1), (32, 1))
    assert gate_up.features(torch.tensor([5, 1])).tolist() == [1, 5, 33, 37]
    assert gate_up.features([]).tolist() == []


def test_a_unit_of_grouped_queries_is_a_key_value_head_with_its_query_heads():
    group = find("qwen3")["decoder.0.attention"]
    assert (group.n_units, group.heads_per_unit) == (2, 2)
    assert [p.segments for p in group.parts] == [((0, 16),), ((0, 8),), ((0, 8),), ((0, 16),)]
    assert group.unit_params == 16 * (16 + 8 + 8) + 16 * 16
    biased = find("qwen2")["decoder.0.attention"]
    assert biased.unit_params == 17 * (8 + 4 + 4) + 8 * 16


def test_self_attention_of_t5_is_tied_over_a_stack_with_its_position_bias():
    groups = find("t5")
    assert list(groups) == [
        "encoder.*.attention",
        "encoder.0.ffn",
        "encoder.1.ffn",
        "decoder.*.attention",
        "decoder.0.cross_attention",
        "decoder.0.ffn",
        "decoder.1.cross_attention",
        "decoder.1.ffn",
    ]
    tied = groups["decoder.*.attention"]
    assert [p.path.rpartition(".")[2] for p in tied.parts] == [
        *("q", "k", "v", "o", "relative_attention_bias"),
        *("q", "k", "v", "o"),
    ]
    assert (tied.layer, tied.n_units, tied.unit_params) == (0, 4, 2 * 4 * 16 * 4 + 32)
    assert len(find("t5_gated")["encoder.0.ffn"].parts) == 3


def test_units_hold_what_a_cut_removes():
    for name in ("roberta", "opt", "vit"):
        model = TINY[name]()
        groups = find_groups(model)
        for group in groups:
            weights = 0
            for part in group.parts:
                layer = model.get_submodule(part.path)
                per_row = layer.weight.shape[1] + 1 if part.side == "out" else layer.weight.shape[0]
                weights += per_row * sum(size for _, size in part.segments)
            assert weights == group.unit_params


@pytest.mark.parametrize("name", ["deberta_v2", "phi3", "olmo2", "starcoder2"])
def test_heads_that_may_not_come_apart_are_no_groups(name):
    assert {g.what for g in find(name).values()} == {"neurons"}


def test_cross_attention():
    config = GPT2Config(n_embd=16, n_head=4, n_layer=1, vocab_size=8, add_cross_attention=True)
    with pytest.raises(SiteError):
        find_groups(nn.Linear(2, 2))
    groups = find_groups(on_meta(config))
    assert [g.id for g in groups] == ["decoder.0.attention", "decoder.0.ffn"]
    assert not any("crossattention" in p.path for g in groups for p in g.parts)
    config = BertConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=8,
        is_decoder=True,
        add_cross_attention=True,
    )
    ids = [g.id for g in find_groups(on_meta(config))]
    assert ids == ["encoder.0.attention", "encoder.0.cross_attention", "encoder.0.ffn"]


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in "ab"]
        self.layers = nn.ModuleList(layers)


def test_an_unknown_model_is_refused_and_the_known_ones_are_named():
    with pytest.raises(SiteError, match=r"Unknown \(model type 'none'\).*bert.*llama.*bloom"):
        find_groups(Unknown())


def test_sizes_of_roberta_large():
    config = RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    model = on_meta(config)
    groups = find_groups(model)
    heads, neurons = groups[:2]
    assert heads.unit_params == 4 * 1024 * 64 + 3 * 64
    assert neurons.unit_params == 2 * 1024 + 1
    scores = {g.id: torch.ones(g.n_units) for g in groups}
    five = choose_units(groups, scores, {"heads": 1 / 3, "neurons": 1 / 3})
    six = choose_units(groups, scores, {"heads": 6 / 16, "neurons": 1 / 3})
    assert {len(five.keep[g.id]) for g in groups if g.what == "heads"} == {11}
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert round(encoder / 1e6, 1) == 302.3
    gone = [removed_params(groups, cut) for cut in (five, six)]
    assert [round(n / 1e6, 1) for n in gone] == [98.6, 104.9]
    assert [round(100 * n / encoder, 1) for n in gone] == [32.6, 34.7]
    before = count_base_params(model)
    apply_cut(model, groups, five)
    assert before - count_base_params(model) == gone[0]


def test_counts_of_llama_7b():
    model = on_meta(LlamaConfig())
    groups = find_groups(model)
    assert len(groups) == 64
    cuttable = [g for g in groups if 3 <= g.layer <= 30]
    scores = {g.id: torch.arange(g.n_units) for g in cuttable}
    cut = choose_units(cuttable, scores, {"heads": 0.5, "neurons": 0.5})
    assert {len(units) for units in cut.keep.values()} == {16, 5504}
    assert removed_params(groups, cut) == 28 * (16 * 4 * 4096 * 128 + 5504 * 3 * 4096)
    assert round(removed_params(groups, cut) / 1e9, 3) == 2.833
    before = count_base_params(model)
    apply_cut(model, groups, cut)
    assert before - count_base_params(model) == removed_params(groups, cut)
