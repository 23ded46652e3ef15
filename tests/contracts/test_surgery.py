"""Hidden by masks equals cut for good, in every family and for every choice of structures."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from prunepeft.candidates import make_space
from prunepeft.errors import ConfigError, StateError
from prunepeft.sites import count_base_params, find_sites
from prunepeft.structured import (
    Cut,
    Group,
    Masks,
    apply_cut,
    express,
    find_groups,
    removed_params,
)
from prunepeft.supernet import attach, placement_of
from tests.tiny_models import MORE, TINY, tiny_inputs

FAMILIES = tuple(
    "bert roberta xlm_roberta camembert electra distilbert gpt2 opt bart llama mistral qwen2 qwen3 "
    "gemma gemma2 gemma3 t5 t5_gated vit deit".split()
)
NEURONS_ONLY = tuple(
    "deberta_v2 mpnet modernbert phi phi3 gpt_neox bloom starcoder2 olmo2 granite".split()
)
CHOICES = ("heads", "neurons", "both", "uneven")
# Their config has fields for fewer heads of the same width.
SAYS_HEADS = tuple("llama mistral qwen2 qwen3 gemma gemma2 gemma3 t5 t5_gated".split())

Case = tuple[PreTrainedModel, dict[str, Tensor], tuple[Group, ...]]


@cache
def case(name: str, attention: str = "eager") -> Case:
    model = (TINY | MORE)[name](attn_implementation=attention)
    return model, tiny_inputs(name, model), find_groups(model)


def make_cut(groups: tuple[Group, ...], choice: str) -> Cut:
    """Heads lose one unit and neurons a third; "uneven": each group another number, one FFN all."""
    generator = torch.Generator().manual_seed(3)
    keep: dict[str, tuple[int, ...]] = {}
    n_ffn = 0
    for i, group in enumerate(groups):
        order = torch.randperm(group.n_units, generator=generator).tolist()
        gone = 1 if group.what == "heads" else group.n_units // 3
        if choice == "uneven":
            gone = i % group.n_units if group.what == "heads" else 3 * i
            if group.what == "neurons":
                gone, n_ffn = (gone if n_ffn else group.n_units), n_ffn + 1
        if choice in (group.what, "both", "uneven"):
            keep[group.id] = tuple(sorted(order[gone:]))
    return Cut(keep, {g.id: g.n_units for g in groups if g.id in keep})


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def check_masked_is_cut(case: Case, choice: str) -> None:
    plain, inputs, groups = case
    cut = make_cut(groups, choice)
    model = copy.deepcopy(plain)
    before = logits(model, inputs)
    masks = Masks(model, groups)
    assert_close(logits(model, inputs), before, rtol=0, atol=0)
    masks.show(cut)
    hidden = logits(model, inputs)
    masks.remove()
    assert_close(logits(model, inputs), before, rtol=0, atol=0)
    assert not torch.allclose(hidden, before, atol=1e-4)

    n_before = count_base_params(model)
    apply_cut(model, groups, cut)
    assert_close(logits(model, inputs), hidden, rtol=1e-5, atol=1e-5)
    assert n_before - count_base_params(model) == removed_params(groups, cut)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_cut(name, choice, attention):
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("it caps attention scores, which sdpa cannot")
    check_masked_is_cut(case(name, attention), choice)


@pytest.mark.parametrize("name", NEURONS_ONLY)
def test_families_without_safe_heads_lose_neurons(name):
    tiny = case(name)
    assert {g.what for g in tiny[2]} == {"neurons"}
    check_masked_is_cut(tiny, "uneven")


@pytest.mark.parametrize("choice", ["heads", "neurons", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_says_the_cut_builds_the_cut_model(name, choice):
    plain, inputs, groups = case(name)
    model = copy.deepcopy(plain)
    before = model.config.to_dict()
    apply_cut(model, groups, make_cut(groups, choice))
    if choice != "neurons" and name not in SAYS_HEADS:
        assert model.config.to_dict() == before
        return
    rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    rebuilt.set_attn_implementation("eager")
    assert_close(logits(rebuilt, inputs), logits(model, inputs))


def test_configs_cannot_say_layers_of_several_widths_or_heads_that_do_not_divide():
    model, _, groups = case("t5")
    config = copy.deepcopy(model.config)
    assert not express(config, groups, make_cut(groups, "uneven"))
    assert config.to_dict() == model.config.to_dict()
    wide = TINY["llama"](num_key_value_heads=4)
    groups = find_groups(wide)
    assert not express(wide.config, groups, make_cut(groups, "heads"))  # 16 % 3
    assert wide.config.num_attention_heads == 4


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gemma3", "t5"])
def test_generate_after_the_cut(name):
    plain, inputs, groups = case(name, "sdpa")
    model = copy.deepcopy(plain)
    masks = Masks(model, groups)
    cut = make_cut(groups, "uneven")
    masks.show(cut)
    ids = {k: inputs[k][:1] for k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    hidden = model.generate(**ids, **settings)
    masks.remove()
    apply_cut(model, groups, cut)
    assert model.generate(**ids, **settings).tolist() == hidden.tolist()
    static = model.generate(**ids, **settings, cache_implementation="static")
    assert static.tolist() == hidden.tolist()


def test_tied_embeddings_stay_tied_and_the_rest_is_untouched():
    plain, _, groups = case("gpt2")
    model = copy.deepcopy(plain)
    apply_cut(model, groups, make_cut(groups, "both"))
    assert model.lm_head.weight is model.transformer.wte.weight
    parts = {p.path for g in groups for p in g.parts}
    for name, value in plain.state_dict().items():
        if name.rpartition(".")[0] not in parts:
            assert torch.equal(model.state_dict()[name], value)


def test_attentions_know_their_heads():
    plain, _, groups = case("bert")
    model = copy.deepcopy(plain)
    apply_cut(model, groups, make_cut(groups, "heads"))
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (3, 12)
    assert (attention.query.out_features, attention.query.bias.shape) == (12, (12,))
    assert model.bert.encoder.layer[0].attention.output.dense.in_features == 12
    plain, _, groups = case("gpt2")
    model = copy.deepcopy(plain)
    apply_cut(model, groups, make_cut(groups, "heads"))
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size) == (3, 12)
    assert (attention.c_attn.nx, attention.c_attn.nf, attention.c_proj.nx) == (16, 36, 12)
    plain, _, groups = case("llama")
    model = copy.deepcopy(plain)
    apply_cut(model, groups, make_cut(groups, "heads"))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features // attention.k_proj.out_features == 2
    assert attention.num_key_value_groups == 2


def test_the_position_bias_of_t5_keeps_the_columns_of_its_heads():
    plain, _, groups = case("t5")
    model = copy.deepcopy(plain)
    apply_cut(model, groups, Cut({"encoder.*.attention": (0, 2)}, {"encoder.*.attention": 4}))
    where = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    old, new = (m.get_submodule(where).weight for m in (plain, model))
    assert torch.equal(new, old[:, [0, 2]])
    assert model.get_submodule(where).embedding_dim == 2


def test_a_copy_of_a_masked_model_follows_its_own_masks():
    plain, inputs, groups = case("bert")
    model = copy.deepcopy(plain)
    before = logits(model, inputs)
    model.add_module("masks", Masks(model, groups))
    other = copy.deepcopy(model)
    other.masks.show(make_cut(groups, "both"))
    assert_close(logits(model, inputs), before, rtol=0, atol=0)
    assert not torch.allclose(logits(other, inputs), before)
    other.masks.remove()
    assert_close(logits(other, inputs), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "t5_gated"])
def test_gradients_reach_the_masks(name):
    plain, inputs, groups = case(name)
    model = copy.deepcopy(plain).requires_grad_(False)
    masks = Masks(model, groups, trainable=True)
    assert [(m, v.dtype) for m, v in masks.named_parameters()]
    model(**inputs).logits.square().sum().backward()
    for group_id in masks:
        grad = masks[group_id].grad
        assert grad.shape == masks[group_id].shape
        assert (grad != 0).all()


def test_masks_of_tied_layers_are_one_and_work_in_half_precision():
    model = TINY["t5"]().to(torch.bfloat16)
    groups = find_groups(model)
    masks = Masks(model, groups)
    assert len(masks) == len(groups) == 8
    assert masks["encoder.*.attention"].dtype == torch.float32
    assert logits(model, tiny_inputs("t5", model)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_modules_on_the_layers_are_cut_with_them(name):
    plain, inputs, groups = case(name)
    space = make_space(find_sites(plain), ("lora",), sizes={"lora": 2})
    net = attach(copy.deepcopy(plain), space.full(), seed=5).eval()
    with torch.no_grad():
        for i, (key, value) in enumerate(net.named_parameters()):
            if "union_" in key:
                value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    cut = make_cut(groups, "uneven")
    masks = Masks(net, groups)
    masks.show(cut)
    hidden = logits(net, inputs)
    masks.remove()
    apply_cut(net, groups, cut)
    assert_close(logits(net, inputs), hidden, rtol=1e-5, atol=1e-5)
    for slot in placement_of(net):
        for site in slot.sites:
            base = net.base_model.model.get_submodule(site.path).base_layer
            expected = base.weight.shape if name == "gpt2" else base.weight.shape[::-1]
            assert (site.d_in, site.d_out) == tuple(expected)


def test_what_cannot_be_cut_is_refused_before_anything_changes():
    plain, _, groups = case("bert")
    model = copy.deepcopy(plain)
    cut = make_cut(groups, "both")
    with pytest.raises(ConfigError, match="this model has no such group"):
        apply_cut(model, groups, Cut({"encoder.9.ffn": (0,)}, {"encoder.9.ffn": 4}))
    with pytest.raises(ConfigError, match=r"made for 5 units .* this model has 32"):
        apply_cut(model, groups, Cut({"encoder.0.ffn": (0,)}, {"encoder.0.ffn": 5}))
    masks = Masks(model, groups)
    with pytest.raises(StateError, match="masks are on the model"):
        apply_cut(model, groups, cut)
    masks.remove()
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"layer.1.output.dense' is a Linear of int8.*quantised"):
        apply_cut(model, groups, cut)
    query = model.bert.encoder.layer[0].attention.self.query
    assert query.out_features == 16
    layer.weight = nn.Parameter(layer.weight.float())
    apply_cut(model, groups, cut)
    with pytest.raises(StateError, match="cut already"):
        apply_cut(model, groups, cut)


def test_a_cut_model_can_be_cut_again():
    plain, inputs, _ = case("t5_gated", "sdpa")
    model = copy.deepcopy(plain)
    for choice in ("uneven", "heads"):
        groups = find_groups(model)
        if choice == "heads":
            groups = tuple(g for g in groups if g.n_units > 1)
        cut = make_cut(groups, choice)
        masks = Masks(model, groups)
        masks.show(cut)
        hidden = logits(model, inputs)
        masks.remove()
        apply_cut(model, groups, cut)
        assert_close(logits(model, inputs), hidden, rtol=1e-5, atol=1e-5)


class Toy(nn.Module):
    """The hand case of a feed-forward: W2 relu(W1 x + b1) + b2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 2), nn.Linear(2, 2)
        self.up.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        self.up.bias.data = torch.zeros(2)
        self.down.weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        self.down.bias.data = torch.tensor([0.5, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_worked_numbers_of_a_feed_forward():
    from prunepeft.structured import Part

    parts = (Part("up", "out", ((0, 1),)), Part("down", "in", ((0, 1),)))
    groups = (Group("encoder.0.ffn", "neurons", "encoder", 0, "ffn", 2, 1, 5, parts),)
    model, x = Toy(), torch.tensor([1.0, 2.0])
    assert model(x).tolist() == [7.5, 3.0]
    cut = Cut({"encoder.0.ffn": (0,)}, {"encoder.0.ffn": 2})
    masks = Masks(model, groups)
    masks.show(cut)
    assert model(x).tolist() == [1.5, 0.0]
    masks.remove()
    apply_cut(model, groups, cut)
    assert model(x).tolist() == [1.5, 0.0]
    assert sum(p.numel() for p in model.parameters()) == 12 - removed_params(groups, cut)
