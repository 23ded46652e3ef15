import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prunepeft.errors import SiteError
from prunepeft.sites import count_base_params, describe_sites, find_sites, linear_dims
from tests.tiny_models import LAYERS, TINY


class OddBlock(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.mixer_attn = nn.ModuleDict(
            {
                "to_qkv": nn.Linear(width, 3 * width),
                "wq": nn.Linear(width, width),
                "wo": nn.Linear(width, width),
            }
        )
        self.feed = nn.ModuleDict(
            {"fc1": nn.Linear(width, 9), "zap": nn.Linear(9, 9), "fc2": nn.Linear(9, width)}
        )


class OddModel(nn.Module):
    def __init__(self, n_blocks=3):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.tower = nn.ModuleList(OddBlock() for _ in range(n_blocks))
        self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def test_unknown_model_falls_back_to_structure_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="prunepeft.sites"):
        sites = find_sites(OddModel())
    last = [
        (s.path, s.stack, s.block, s.role, s.d_in, s.d_out, s.source) for s in sites if s.layer == 2
    ]
    assert last == [
        ("tower.2.mixer_attn.to_qkv", "encoder", "attention", "other", 6, 18, ""),
        ("tower.2.mixer_attn.wq", "encoder", "attention", "q", 6, 6, ""),
        ("tower.2.mixer_attn.wo", "encoder", "attention", "o", 6, 6, "tower.2.mixer_attn.wq"),
        ("tower.2.feed.fc1", "encoder", "ffn", "up", 6, 9, ""),
        ("tower.2.feed.zap", "encoder", "ffn", "other", 9, 9, ""),
        ("tower.2.feed.fc2", "encoder", "ffn", "down", 9, 6, "tower.2.feed.fc1"),
    ]
    assert {s.n_layers for s in sites} == {3}
    assert "OddModel has layers of no known family" in caplog.text
    assert "tower.*.feed.zap" in caplog.text


def test_two_unknown_towers_are_numbered_through():
    model = nn.ModuleDict({"a": OddModel(2), "b": OddModel(3)})
    sites = find_sites(model)
    assert {s.layer for s in sites if s.path.startswith("b.")} == {2, 3, 4}
    assert {s.n_layers for s in sites} == {5}


def test_experts_get_the_source_of_their_own(caplog):
    def block():
        experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
            for _ in range(2)
        )
        return nn.ModuleDict({"experts": experts, "gate": nn.Linear(4, 2)})

    sites = find_sites(nn.ModuleDict({"layers": nn.ModuleList([block(), block()])}))
    down = [s for s in sites if s.role == "down"]
    assert [s.source for s in down] == [s.path.replace("down", "up") for s in down]
    router = next(s for s in sites if s.path == "layers.0.gate")
    assert router.role == "other"  # it picks experts; it gates no feed-forward


def test_a_linear_layer_the_family_does_not_name_is_reported(caplog):
    model = TINY["llama"](head="base")
    for layer in model.layers:
        layer.mlp.router = nn.Linear(16, 2)
    sites = find_sites(model)
    assert len([s for s in sites if s.role != "norm"]) == 8 * LAYERS
    assert len([s for s in sites if s.role == "norm"]) == 2 * LAYERS
    assert [s.role for s in sites if s.path.endswith("router")] == ["other"] * LAYERS
    assert "layers.*.mlp.router" in caplog.text
    assert "q_proj" not in caplog.text


def test_known_part_of_a_larger_model_is_used_and_the_rest_reported(caplog):
    class Composite(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = OddModel(2)
            self.language = TINY["llama"](head="base")

    sites = find_sites(Composite())
    assert {s.path.split(".")[0] for s in sites} == {"language"}
    assert "these repeated blocks carry no sites: vision.tower" in caplog.text


def test_layers_whose_weight_is_read_by_the_attention_around_them_are_no_sites():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    sites = find_sites(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    names = [s.path.removeprefix("layers.0.") for s in sites if s.layer == 0]
    assert names == ["linear1", "linear2", "norm1", "norm2"]
    assert [s.role for s in sites if s.layer == 0] == ["up", "down", "norm", "norm"]


def test_older_names_of_vit_are_known(caplog):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict(
                {
                    "attention": nn.ModuleDict(
                        {n: nn.Linear(4, 4) for n in ("query", "key", "value")}
                    ),
                    "output": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
                }
            )
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(4, 8)})
            self.output = nn.ModuleDict({"dense": nn.Linear(8, 4)})

    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList([Layer(), Layer()])})})
    model.config = SimpleNamespace(model_type="vit")
    roles = [s.role for s in find_sites(model) if s.layer == 1]
    assert roles == ["q", "k", "v", "o", "up", "down"]
    assert caplog.text == ""


class QuantisedLinear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(
            torch.zeros(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False
        )


def test_quantised_layers_are_linear_and_count_as_what_they_stand_for():
    model = TINY["llama"](head="base")
    before, n_before = find_sites(model), count_base_params(model)
    for layer in model.layers:
        layer.mlp.up_proj = QuantisedLinear(16, 32)
    assert linear_dims(model.layers[0].mlp.up_proj) == (16, 32)
    assert find_sites(model) == before
    assert count_base_params(model) == n_before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), r"Linear \(model type 'none', 1 linear layers\) has no list"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "2 linear layers"),
        (nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)]), "0 linear layers"),
    ],
)
def test_a_model_without_blocks_is_refused(model, message):
    with pytest.raises(SiteError, match=message):
        find_sites(model)


def test_a_model_that_carries_adapters_is_refused():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SiteError, match="Detach or merge the adapter first"):
        find_sites(wrapped)


def test_table_is_aligned_and_has_one_row_per_name():
    text = describe_sites(find_sites(TINY["llama"](head="base")))
    header, *rows = text.splitlines()
    assert header.split() == ["stack", "block", "role", "d_in", "d_out", "path", "layers"]
    assert rows[1].split() == ["decoder", "attention", "k", "16", "8", *_last("k_proj")]
    assert rows[-1].split() == ["decoder", "ffn", "norm", "16", "16", _norm_path(), "0-1"]
    assert len(rows) == 9
    assert {row.index("layers.*") for row in rows} == {header.index("path")}


def _norm_path():
    return "layers.*.post_attention_layernorm"


def _last(name):
    return [f"layers.*.self_attn.{name}", "0-1"]


def test_base_params_leave_out_a_new_head_but_not_a_language_model_head():
    bare = sum(p.numel() for p in TINY["bert"](head="base").parameters())
    assert count_base_params(TINY["bert"](head="base")) == bare
    assert count_base_params(TINY["bert"](n_labels=7)) == bare
    llama = TINY["llama"](head="causal-lm")
    assert count_base_params(llama) == sum(p.numel() for p in llama.parameters())
    tied = TINY["gpt2"](head="causal-lm")
    assert count_base_params(tied) == count_base_params(TINY["gpt2"](head="base"))
