"""Prefixes against numbers worked by hand, the model's own cache, and the attention around them."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from prunepeft.candidates import make_space
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError, SiteError
from prunepeft.kinds import count_params, make_kind, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Site
from prunepeft.supernet import (
    UnionConfig,
    attach,
    attention,
    detach,
    gate_slots,
    placement_of,
    remove_slots,
    slot_layers,
    slot_parameters,
)
from prunepeft.supernet.attention import NAME, attend
from tests.tiny_models import TINY, make_tiny, tiny_inputs

FAMILIES = tuple(name for name in TINY if name != "deberta_v2")
CAUSAL = ("llama", "gpt2")
SIZE = 3


def put(model: PreTrainedModel, size: int = SIZE) -> PeftModel:
    """The model with a prefix of large random values in every self-attention."""
    net = attach(model, make_space(find_sites(model), ["prefix"], sizes={"prefix": size}).full())
    for parameters in slot_parameters(net).values():
        for name, parameter in parameters.items():
            parameter.data = 0.7 * torch.randn(parameter.shape, generator=seeded(0, name))
    return net.eval()


def output(net: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return net(**inputs).logits


# --- values --------------------------------------------------------------------------------


def one_head() -> tuple[PeftModel, nn.Module, dict[str, Tensor]]:
    """One head of width 2; the token's score is 0, that of the prefix ln 3."""
    net = put(make_tiny("bert", hidden_size=2, num_attention_heads=1, num_hidden_layers=1), size=1)
    module = net.base_model.model.bert.encoder.layer[0].attention.self
    params = module.value.params("default", "prefix")
    params["keys"].data = torch.tensor([[math.log(3), 5.0]])
    params["values"].data = torch.tensor([[0.0, 1.0]])
    values = {"query": [1.0, 0.0], "key": [0.0, 7.0], "value": [1.0, 0.0]}
    return net, module, {k: torch.tensor(v).view(1, 1, 1, 2) for k, v in values.items()}


@pytest.mark.parametrize(("gate", "share"), [(1.0, 0.75), (1 / 3, 0.5), (0.0, 0.0), (3.0, 0.9)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_by_hand(implementation: str, gate: float, share: float) -> None:
    net, module, inputs = one_head()
    net.base_model.model.set_attn_implementation(implementation)
    gate_slots(net, dict.fromkeys(placement_of(net).ids, gate))
    found, weights = attend(module, **inputs, attention_mask=None, scaling=1.0)
    assert_close(found.flatten(), torch.tensor([1 - share, share]))
    if implementation == "eager":
        assert_close(weights, torch.full((1, 1, 1, 1), 1 - share))


@pytest.mark.parametrize("name", CAUSAL)
def test_prefix_equals_the_cache_filled_with_it(name: str) -> None:
    model = TINY[name]()
    inputs = tiny_inputs(name, model)
    found = output(net := put(copy.deepcopy(model)), inputs)
    heads = model.config.num_key_value_heads if name == "llama" else model.config.n_head
    cache = DynamicCache(config=model.config)
    for index, parameters in enumerate(slot_parameters(net).values()):
        keys, values = (
            p.detach().unflatten(-1, (heads, -1)).transpose(0, 1).expand(2, -1, -1, -1)
            for p in parameters.values()
        )
        cache.update(keys, values, index)
    mask = torch.cat([torch.ones(2, SIZE, dtype=torch.long), inputs["attention_mask"]], 1)
    positions = torch.arange(6).expand(2, -1)
    with torch.no_grad():
        expected = model(
            inputs["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        ).logits
    real = inputs["attention_mask"].bool()
    assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    assert (found - output(model, inputs)).abs().max() > 1e-2


def test_gradient_by_finite_differences() -> None:
    net = put(make_tiny("llama", num_hidden_layers=1).double(), size=2)
    module = net.base_model.model.model.layers[0].self_attn
    params = module.v_proj.params("default", "prefix")
    for parameter in params.values():
        parameter.data = parameter.data.double()
    draw = seeded(0, "states")
    sizes = ((1, 4, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    states = [torch.randn(s, generator=draw).double().requires_grad_() for s in sizes]
    module.v_proj.branches["default"]["prefix"].gate = torch.tensor([0.5, 1.0])

    def run(*leaves: Tensor) -> Tensor:  # the first two are the module's own parameters
        return attend(module, *leaves[2:], None, scaling=0.5)[0]

    assert torch.autograd.gradcheck(run, [*params.values(), *states])


@pytest.mark.parametrize("name", FAMILIES)
def test_sdpa_and_eager_agree_at_every_gate(name: str) -> None:
    model = TINY[name]()
    inputs = tiny_inputs(name, model)
    net, own = put(model), model.config._attn_implementation
    ids = placement_of(net).ids
    seen = []
    for gate in (1.0, 0.4, 0.0):
        gate_slots(net, dict.fromkeys(ids, gate))
        pair = []
        for implementation in ("eager", "sdpa"):
            if name == "gemma2" and implementation == "sdpa":
                continue  # its capped scores exist in eager only
            model.set_attn_implementation(implementation)
            pair.append(output(net, inputs))
        assert_close(pair[0], pair[-1], rtol=0, atol=2e-5)
        seen.append(pair[0])
    model.set_attn_implementation(own)
    with net.disable_adapter():
        base = output(net, inputs)
    assert_close(seen[2], base, rtol=0, atol=1e-5)
    changes = [(s - base).abs().max().item() for s in seen]
    assert changes[0] > changes[1] > 1e-4


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_padding_is_not_seen(name: str) -> None:
    model = TINY[name]()
    inputs = tiny_inputs(name, model)
    net, real = put(model), inputs["attention_mask"].bool()
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(~real, 9)}
    first, second = output(net, inputs), output(net, other)
    shown = real if name in CAUSAL else slice(None)
    assert_close(first[shown], second[shown], rtol=0, atol=1e-6)


# --- generation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation_with_and_without_cache(name: str, implementation: str) -> None:
    net = put(make_tiny(name, attn_implementation=implementation))
    ids = tiny_inputs(name, net)["input_ids"][:1]
    more = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    more |= {"output_scores": True, "return_dict_in_generate": True}
    mask = torch.ones_like(ids)
    runs = [
        net.generate(input_ids=ids, attention_mask=mask, **more, **kind)
        for kind in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
    mask = torch.cat([torch.zeros_like(mask[:, :2]), mask], 1)
    both = {
        "input_ids": torch.cat([padded, padded.flip(1)]),
        "attention_mask": torch.cat([mask, torch.ones_like(mask)]),
    }
    runs.append(net.generate(**both, **more))
    scores = [torch.stack(r.scores)[:, 0] for r in runs]
    for found in scores[1:]:
        assert_close(found, scores[0], rtol=0, atol=1e-5)
    with net.disable_adapter():
        plain = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    assert not torch.allclose(plain.scores[0][0], scores[0][0], atol=1e-2)


# --- on and off the model ------------------------------------------------------------------


def attentions(model: nn.Module) -> list[str]:
    """Name of the attention function that each module would look up."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_attention_is_its_own_again(name: str) -> None:
    model = TINY[name]()
    inputs, before = tiny_inputs(name, model), attentions(model)
    expected = output(model, inputs)
    net = put(model)
    changed = output(net, inputs)
    assert NAME not in before
    assert attentions(model).count(NAME) == len(placement_of(net))
    assert model.config._attn_implementation == before[0]
    with net.disable_adapter():
        assert_close(output(net, inputs), expected, rtol=0, atol=0)
    twin = copy.deepcopy(net)
    first, *rest = placement_of(net).ids
    remove_slots(net, rest)
    assert attentions(model).count(NAME) == 1
    remove_slots(net, [first])
    assert attentions(model) == before
    assert_close(output(net, inputs), expected, rtol=0, atol=0)
    assert_close(output(twin, inputs), changed, rtol=0, atol=0)
    bare = detach(twin)
    assert attentions(bare) == before
    assert_close(output(bare, inputs), expected, rtol=0, atol=0)


def test_a_second_adapter_adds_its_prefix_and_is_deleted() -> None:
    model = TINY["llama"]()
    inputs = tiny_inputs("llama", model)
    expected, before = output(model, inputs), attentions(model)
    net = put(model)
    one = output(net, inputs)
    net.add_adapter("other", UnionConfig(placement=placement_of(net).to_dict(), init_seed=1))
    net.base_model.set_adapter(["default", "other"])
    both = output(net, inputs)
    net.base_model.set_adapter(["other"])
    other = output(net, inputs)
    seen = [expected, one, both, other]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(seen) for b in seen[:i])
    net.delete_adapter("default")
    assert_close(output(net, inputs), other, rtol=0, atol=0)
    net.delete_adapter("other")
    assert attentions(model) == before
    assert_close(output(model, inputs), expected, rtol=0, atol=0)


def test_models_that_share_a_config_do_not_disturb_each_other() -> None:
    first = TINY["bert"]()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert second.config is first.config
    inputs = tiny_inputs("bert", first)
    expected = output(second, inputs)
    net = put(first)
    changed = output(net, inputs)
    assert_close(output(second, inputs), expected, rtol=0, atol=0)
    detach(put(second))
    assert_close(output(net, inputs), changed, rtol=0, atol=0)


def test_attention_weights_keep_their_shape() -> None:
    net = put(make_tiny("bert", attn_implementation="eager"))
    inputs = tiny_inputs("bert", net)
    with torch.no_grad():
        weights = net(**inputs, output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, 4, 6, 6)] * 2
    assert all((w.sum(-1) < 0.99).all() for w in weights)


# --- what is observed ----------------------------------------------------------------------


def test_observer_sees_the_change_of_the_attention_output() -> None:
    net, module, inputs = one_head()
    seen: list[tuple[str, Tensor, Tensor]] = []
    module.value.observer = lambda branch, *tensors: seen.append((branch.slot_id, *tensors))
    attend(module, **inputs, attention_mask=None, scaling=1.0, dropout=0.9)
    ((slot_id, delta, base),) = seen
    assert slot_id == placement_of(net).ids[0]
    assert_close(delta.flatten(), torch.tensor([-0.75, 0.75]))
    assert_close(base.flatten(), torch.tensor([1.0, 0.0]))
    assert not delta.requires_grad


@pytest.mark.parametrize("watched", [False, True])
def test_only_watching_costs_more(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module, inputs = one_head()
    calls = []
    compute = attention._attention
    monkeypatch.setattr(
        attention, "_attention", lambda *a, **k: calls.append(1) or compute(*a, **k)
    )
    module.value.observer = (lambda *_: None) if watched else None
    attend(module, **inputs, attention_mask=None, scaling=1.0)
    assert len(calls) == (3 if watched else 1)


def test_recording_does_not_change_training() -> None:
    net = put(make_tiny("bert", attention_probs_dropout_prob=0.3)).train()
    inputs = tiny_inputs("bert", net)
    losses = []
    recorder = Recorder.for_net(net, output_every=1)
    for watching in (False, True):
        torch.manual_seed(0)
        if watching:
            recorder.__enter__()
        loss = net(**inputs).logits.square().mean()
        loss.backward()
        losses.append(loss.item())
    recorder.step()
    record = recorder.read()
    recorder.__exit__(None, None, None)
    assert losses[0] == losses[1]
    assert (record.output_abs_mean > 1e-3).all()
    assert all(layer.observer is None for pairs in slot_layers(net).values() for layer, _ in pairs)


# --- where it goes and how much it costs ---------------------------------------------------


def test_count_on_bert_base() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("bert"))
    space = make_space(find_sites(model), ["prefix"], sizes={"prefix": 10})
    assert len(space) == 12
    assert count_params(space.full()) == 12 * 10 * 2 * 768 == 184_320


@pytest.mark.parametrize(
    ("name", "slots", "width"), [("llama", 2, 8), ("gpt2", 2, 16), ("t5", 4, 16), ("vit", 2, 16)]
)
def test_one_prefix_in_each_self_attention(name: str, slots: int, width: int) -> None:
    space = make_space(find_sites(TINY[name]()), ["prefix"], sizes={"prefix": 5})
    assert len(space) == slots  # none in the cross-attention of T5
    assert count_params(space.full()) == slots * 2 * 5 * width


@pytest.mark.parametrize(
    ("block", "role", "d_out", "fits"),
    [
        ("attention", "v", 4, True),
        ("attention", "fused_qkv", 48, True),
        ("attention", "fused_qkv", 32, False),  # grouped queries
        ("attention", "q", 16, False),
        ("cross_attention", "v", 16, False),
        ("ffn", "v", 16, False),
    ],
)
def test_sites_that_fit(block: str, role: str, d_out: int, fits: bool) -> None:
    assert make_kind("prefix").fits(Site("p", "decoder", 0, 1, block, role, 16, d_out)) == fits


def test_first_values() -> None:
    site = Site("p", "encoder", 0, 1, "attention", "v", 8, 400)
    for options, std in (({}, 0.02), ({"init_std": 0.5}, 0.5)):
        kind = make_kind("prefix", options)
        for value in kind.init(kind.shapes(site, 100), None, seeded(0)).values():
            assert value.std().item() == pytest.approx(std, rel=0.02)
    with pytest.raises(ConfigError, match=r"prefix.init_std must be in \[1e-06, 10\]; got 0"):
        make_kind("prefix", {"init_std": 0})


def test_models_that_cannot_carry_a_prefix_say_so() -> None:
    model = TINY["deberta_v2"]()
    with pytest.raises(SiteError, match=r"DisentangledSelfAttention.*cannot carry a prefix"):
        put(model)
    upcasting = make_tiny("gpt2", reorder_and_upcast_attn=True)
    with pytest.raises(SiteError, match="cannot carry a prefix"):
        put(upcasting)
    model = TINY["bert"]()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="sdpa or eager; this model runs 'flash_attention_2'"):
        put(model)
    assert NAME not in attentions(model)
