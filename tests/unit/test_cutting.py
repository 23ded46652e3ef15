"""Cutting layers that carry modules: numbers by hand, what is folded, what is refused."""

import copy
import logging

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.errors import ConfigError, SiteError, StateError
from prunepeft.kinds import make_kind, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site
from prunepeft.structured import Cut, apply_cut, find_groups
from prunepeft.supernet import (
    UnionConfig,
    attach,
    detach,
    gate_slots,
    placement_of,
    shrink_slot,
    slot_layers,
    slot_parameters,
)
from prunepeft.supernet.cutting import check_cut, cut_layer
from prunepeft.supernet.layer import Branch, UnionLayer
from tests.one_layer import as_matrix, make_layer, own_params, perturb
from tests.tiny_models import MORE, TINY, tiny_inputs

UP = "bert.encoder.layer.0.intermediate.dense"
DOWN = "bert.encoder.layer.0.output.dense"
HALF = torch.arange(0, 32, 2)


def bert_with(kinds, roles=None, **options):
    model = TINY["bert"]()
    roles = {kind: roles for kind in kinds} if roles else None
    sizes = {k: 4 for k in kinds if make_kind(k).sized}
    sites = find_sites(model)
    space = make_space(sites, kinds, roles=roles, options=options, sizes=sizes)
    net = attach(model, space.full()).eval()
    for parameters in slot_parameters(net).values():
        for name, parameter in parameters.items():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(0, name))
    return net


def layer_at(net, path):
    return net.base_model.model.get_submodule(path)


def values_of(net, path, kind):
    found = layer_at(net, path).params("default", kind)
    return {name: value.detach().clone() for name, value in found.items()}


# --- numbers by hand -----------------------------------------------------------------------


def test_magnitude_of_dora_shrinks_with_the_rows():
    params = {"A": torch.zeros(1, 2), "B": torch.zeros(1, 1), "magnitude": torch.tensor([10.0])}
    layer = make_layer("dora", weight=torch.tensor([[3.0, 4.0]]), bias=False, params=params)
    assert_close(layer(torch.tensor([1.0, 0.0]).double()), torch.tensor([6.0]).double())
    cut_layer(None, "x", layer, None, torch.tensor([0]))
    assert own_params(layer)["magnitude"].tolist() == pytest.approx([6.0])  # 10 * 3 / 5
    assert_close(layer(torch.tensor([1.0]).double()), torch.tensor([6.0]).double())


def test_feed_forward_by_hand():
    w1, w2 = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    up = make_layer("lora", weight=w1, bias=False)
    down = make_layer("lora", weight=w2, params={"A": torch.zeros(1, 2), "B": torch.zeros(2, 1)})
    down.get_base_layer().bias.data = torch.tensor([0.5, 0.0]).double()
    cut_layer(None, "up", up, torch.tensor([0]))
    cut_layer(None, "down", down, None, torch.tensor([0]))
    x = torch.tensor([1.0, 2.0]).double()
    assert down(up(x).relu()).tolist() == [1.5, 0.0]


def test_a_layer_that_keeps_all_is_left_alone():
    layer = perturb(make_layer("loretta_rep", size=2))
    before = {name: value.clone() for name, value in own_params(layer).items()}
    cut_layer(None, "x", layer, torch.arange(8), torch.arange(12))
    assert_close(dict(own_params(layer)), before, rtol=0, atol=0)


# --- what is folded ------------------------------------------------------------------------


def crowded(*kinds, order_seed=0, **options):
    """One layer with these kinds, all perturbed."""
    first, *others = kinds
    layer = make_layer(first, size=2 if make_kind(first).sized else 1, **options.get(first, {}))
    site = layer.branches["default"][first].site
    for kind in others:
        made = make_kind(kind, options.get(kind, {}))
        layer.add("default", Branch("slot", made, site, 2 if made.sized else 1, 2.0), 0)
    draw = torch.Generator().manual_seed(1)
    for kind in kinds:
        for parameter in layer.params("default", kind).values():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return layer.eval()


@pytest.mark.parametrize(
    ("kinds", "side", "kept"),
    [
        (("ether_plus", "lora", "bitfit"), "out", ("lora", "bitfit")),
        (("ether_plus", "dora", "lora"), "out", ("lora",)),  # dora reads the weight
        (("ssl", "ether"), "in", ("ssl",)),
        (("ether", "ssl"), "in", ()),  # ssl acts between ether and the weight
        (("loretta_rep", "lora", "ssl", "ia3"), "in", ("lora",)),  # ia3 at down is an input too
        (("alore", "lora"), "out", ()),  # alore follows the sum
        (("loretta_rep", "serial_adapter"), "in", ("serial_adapter",)),
    ],
)
def test_only_what_must_be_is_folded(kinds, side, kept):
    layer = crowded(*kinds)
    before = {k: {n: p.clone() for n, p in layer.params("default", k).items()} for k in kinds}
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).double()
    keep = torch.arange(0, 8) if side == "in" else torch.tensor([0, 2, 3, 7])
    if side == "in":
        x[:, 8:] = 0
    expected = layer(x)
    cut_layer(None, "x", layer, *((None, keep) if side == "in" else (keep, None)))
    found = layer(x[:, :8] if side == "in" else x)
    assert_close(found, expected if side == "in" else expected[:, keep], rtol=0, atol=1e-6)
    assert list(layer.branches["default"]) == list(kinds)  # in the same order
    expected_axes = {
        k: make_kind(k).feature_axes(layer.branches["default"][k].site, side) for k in kept
    }
    for kind in kept:
        for name, value in layer.params("default", kind).items():
            old = before[kind][name]
            if name in expected_axes[kind]:
                old = old.index_select(expected_axes[kind][name], keep)
            assert_close(value, old, rtol=0, atol=0)
    for kind in set(kinds) - set(kept):
        branch = layer.branches["default"][kind]
        shapes = branch.kind.shapes(branch.site, branch.size)
        fresh = branch.kind.init(shapes, layer, seeded(0, "slot", branch.site.path))
        found = {n: p.detach() for n, p in layer.params("default", kind).items()}
        assert_close(found, fresh, rtol=0, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("kinds", [("ether", "ssl"), ("ssl", "ether"), ("ether", "ether_plus")])
def test_merging_keeps_the_order_of_modules_on_the_input(kinds):
    layer = crowded(*kinds)
    weight, bias = as_matrix(layer)
    layer.merge()
    assert_close(layer.frozen_weight(), weight, rtol=0, atol=1e-10)
    assert_close(layer.get_base_layer().bias, bias, rtol=0, atol=1e-10)


def test_a_reflection_that_starts_again_is_undone_in_the_weight():
    layer = perturb(make_layer("ether"))
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).double()
    x[:, 8:] = 0
    expected = layer(x)
    cut_layer(None, "x", layer, None, torch.arange(8))
    assert own_params(layer)["u"].shape == (1, 8)
    assert_close(layer(x[:, :8]), expected, rtol=0, atol=1e-12)
    own_params(layer)["u"].data += 0.1
    assert not torch.allclose(layer(x[:, :8]), expected, atol=1e-3)


def test_modules_that_read_the_weight_start_when_it_is_final():
    """DoRA begins at the row norms of the weight, which undoing a reflection of outputs changes."""
    layer = crowded("dora", "ether", ether={"side": "output"})
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).double()
    keep = torch.tensor([0, 2, 3, 7])
    expected = layer(x)[:, keep]
    cut_layer(None, "x", layer, keep)
    assert_close(layer(x), expected, rtol=0, atol=1e-6)
    magnitude = layer.params("default", "dora")["magnitude"]
    assert_close(magnitude, layer.frozen_row_norm(), rtol=0, atol=1e-6)


def test_what_does_not_fit_the_new_width_goes_with_a_log_line(caplog):
    net = bert_with(("alore",), roles=(("down",),), alore={"position": "pre"})
    layer = layer_at(net, DOWN)
    keep = torch.arange(30)  # 4 experts do not divide it
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    x[:, 30:] = 0
    expected = layer(x)
    with caplog.at_level(logging.WARNING):
        cut_layer(net, DOWN, layer, None, keep)
    assert "alore.experts must divide" in caplog.text
    assert DOWN in caplog.text
    assert type(layer_at(net, DOWN)) is nn.Linear
    assert_close(layer_at(net, DOWN)(x[:, :30]), expected, rtol=0, atol=1e-5)
    assert placement_of(net).ids == ("encoder.1.ffn.down:alore",)


def test_a_dead_feed_forward_gives_up_its_part_of_a_tied_module():
    net = bert_with(("bitfit", "lora"))
    inputs = tiny_inputs("bert", net)
    cut = Cut({"encoder.0.ffn": ()}, {"encoder.0.ffn": 32})
    apply_cut(net, find_groups(TINY["bert"]()), cut)
    ids = placement_of(net).ids
    assert "encoder.0.ffn.down+norm:bitfit" in ids
    assert "encoder.1.ffn.up+down+norm:bitfit" in ids
    assert not any(i.startswith("encoder.0.ffn") and i.endswith("lora") for i in ids)
    assert type(layer_at(net, UP)) is nn.Linear
    assert {b.slot_id for _, b in layer_at(net, DOWN).active_branches()} == {
        "encoder.0.ffn.down+norm:bitfit"
    }
    gate_slots(net, dict.fromkeys(ids, 0.0))  # every slot is found where its id says
    with torch.no_grad():
        gated = net(**inputs).logits
        assert_close(gated, detach(net)(**inputs).logits, rtol=0, atol=1e-6)


# --- sizes, gates, several adapters --------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loretta_rep"])
def test_shrunk_modules_keep_their_size_and_scaling(kind):
    net = bert_with((kind,), roles=(("up",),))
    slot_id = placement_of(net).ids[0]
    shrink_slot(net, slot_id, torch.tensor([0, 2]))
    ((layer, _),) = slot_layers(net)[slot_id]
    scaling = layer.branches["default"][kind].scaling
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    expected = layer(x)[:, HALF]
    cut_layer(net, UP, layer, HALF)
    branch = layer.branches["default"][kind]
    assert (branch.size, branch.scaling) == (2, scaling)
    assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert {s.id: n for s, n in placement_of(net).sizes.items()}[slot_id] == 2


def test_a_gate_stays_where_nothing_is_folded_and_is_refused_elsewhere():
    layer = perturb(make_layer("dora", size=2))
    layer.branches["default"]["dora"].gate = 0.3
    weight, bias = as_matrix(layer)
    cut_layer(None, "x", layer, torch.tensor([0, 5]), torch.tensor([1, 4, 9]))
    cut_weight, cut_bias = as_matrix(layer)
    assert_close(cut_weight, weight[[0, 5]][:, [1, 4, 9]])
    assert_close(cut_bias, bias[[0, 5]])
    layer = perturb(make_layer("loretta_rep", size=2))
    layer.branches["default"]["loretta_rep"].gate = 0.3
    with pytest.raises(StateError, match="gate"):
        cut_layer(None, "x", layer, torch.tensor([0, 5]))


def test_two_adapters_are_cut_together_but_not_folded():
    net = bert_with(("lora",), roles=(("up",),))
    net.add_adapter("other", UnionConfig(placement=placement_of(net).to_dict()))
    cut_layer(net, UP, layer_at(net, UP), HALF)
    for adapter in ("default", "other"):
        assert layer_at(net, UP).params(adapter, "lora")["B"].shape == (16, 4)
        assert {s.d_out for slot in placement_of(net, adapter) for s in slot.sites} == {16, 32}
    assert not layer_at(net, UP).params("other", "lora")["B"].requires_grad
    net = bert_with(("loretta_rep",), roles=(("up",),))
    net.add_adapter("other", UnionConfig(placement=placement_of(net).to_dict()))
    with pytest.raises(ConfigError, match="default, other"):
        cut_layer(net, UP, layer_at(net, UP), HALF)


def test_a_frozen_adapter_stays_frozen():
    net = bert_with(("ether_plus",), roles=(("up",),))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    cut_layer(net, UP, layer_at(net, UP), HALF)
    assert not any(p.requires_grad for p in net.parameters())


# --- what is refused -----------------------------------------------------------------------


def test_adapters_on_readers_are_refused_before_anything_changes():
    net = bert_with(("serial_adapter", "lora"), roles=(("up",), ("q",)))
    before = copy.deepcopy(net.state_dict())
    groups = find_groups(TINY["bert"]())
    keep = {g.id: (0, 1) for g in groups}
    with pytest.raises(ConfigError, match="serial_adapter on bert") as caught:
        apply_cut(net, groups, Cut(keep, {g.id: g.n_units for g in groups}))
    for layer in (0, 1):
        assert f"encoder.layer.{layer}.intermediate.dense" in str(caught.value)
        assert f"encoder.layer.{layer}.attention.self.query" in str(caught.value)
    assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_merged_and_quantised_layers_are_refused():
    net = bert_with(("lora",), roles=(("up",),))
    net.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        check_cut(net, {UP: (HALF, None)})
    net.unmerge_adapter()
    check_cut(net, {UP: (HALF, None), DOWN: (None, HALF)})
    norm = "bert.encoder.layer.0.output.LayerNorm"
    with pytest.raises(ConfigError, match="LayerNorm"):
        check_cut(net, {norm: (torch.arange(8), None)})


def test_a_fused_attention_with_shared_keys_carries_no_prefix():
    shape = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = MORE["phi3"](**shape)
    with pytest.raises(SiteError, match="shares keys"):
        attach(model, make_space(find_sites(model), ("prefix",), sizes={"prefix": 2}).full())


def test_a_cut_fused_layer_still_fits_a_prefix():
    site = Site("p", "decoder", 0, 1, "attention", "fused_qkv", 16, 36)
    assert make_kind("prefix").fits(site)
    assert make_kind("prefix").shapes(site, 2) == {"keys": (2, 12), "values": (2, 12)}


# --- saving --------------------------------------------------------------------------------


def test_an_adapter_cut_by_layers_is_loaded_on_the_cut_model(tmp_path):
    net = bert_with(("lora", "ether_plus", "ia3", "dora"), roles=(("up",), ("down",)))
    cut_layer(net, UP, layer_at(net, UP), HALF)
    cut_layer(net, DOWN, layer_at(net, DOWN), None, HALF)
    inputs = tiny_inputs("bert", net)
    with torch.no_grad():
        expected = net(**inputs).logits
        net.save_pretrained(tmp_path)
        base = detach(net)
        plain = base(**inputs).logits
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(plain, expected)
    assert isinstance(layer_at(loaded, UP), UnionLayer)
    assert Placement.from_dict(loaded.peft_config["default"].placement) == placement_of(loaded)


def test_parallel_adapter_reads_the_input_as_the_sublayer_got_it():
    """A module on the input of the layer that reads first (here it goes) is not in between."""
    net = bert_with(("parallel_adapter", "ssb"))
    inputs = tiny_inputs("bert", net)
    seen = []
    layer_at(net, UP).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer = layer_at(net, DOWN)
    layer.observer = lambda branch, delta, base: seen.append(delta)
    with torch.no_grad():
        net(**inputs)
        branch = layer.branches["default"]["parallel_adapter"]
        params = layer.params("default", "parallel_adapter")
        expected = branch.kind.transform(params, seen[0], branch.scaling, training=False)
    assert_close(seen[1], expected)
