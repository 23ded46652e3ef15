from collections import Counter
from dataclasses import replace

import pytest

from prunepeft.candidates import (
    LORA_ALL_ROLES,
    make_lora_baseline,
    make_space,
    paper_space,
    place,
)
from prunepeft.errors import BudgetError, ConfigError, SiteError, UnknownNameError
from prunepeft.kinds import KINDS, count_params
from prunepeft.sites import find_sites
from tests.tiny_models import LAYERS, TINY


@pytest.fixture(scope="module")
def sites():
    return {name: find_sites(TINY[name](head="base")) for name in TINY}


def ids(space):
    return [slot.id for slot in space]


def first_layer(space):
    return [slot.id for slot in space if slot.layer == 0]


def test_default_space_of_bert(sites):
    space = make_space(sites["bert"])
    assert first_layer(space) == [
        "encoder.0.attention.q+v:lora",
        "encoder.0.attention.k:lora",
        "encoder.0.attention.o:lora",
        "encoder.0.ffn.up:lora",
        "encoder.0.ffn.down:lora",
        "encoder.0.ffn.down:serial_adapter",
    ]
    assert len(space) == 6 * LAYERS
    assert {slot.sizes for slot in space} == {(16,)}
    assert space.slots[0].sites == tuple(s for s in sites["bert"] if s.layer == 0)[0:3:2]


def test_default_space_of_a_gated_model_ties_up_and_gate(sites):
    assert first_layer(make_space(sites["llama"], ["lora"])) == [
        "decoder.0.attention.q+v:lora",
        "decoder.0.attention.k:lora",
        "decoder.0.attention.o:lora",
        "decoder.0.ffn.up+gate:lora",
        "decoder.0.ffn.down:lora",
    ]


def test_fused_projections_are_used_once_per_kind(sites):
    space = make_space(sites["gpt2"], ["lora", "dora", "ia3"])
    per_kind = Counter(
        slot.kind for slot in space if any(s.role == "fused_qkv" for s in slot.sites)
    )
    assert per_kind == {"lora": LAYERS, "dora": LAYERS, "ia3": LAYERS}
    assert "decoder.0.attention.fused_qkv:lora" in ids(space)


def test_fused_gate_and_up_stand_in_for_both(sites):
    fused = [
        replace(s, role="fused_gate_up") if s.role == "up" else s
        for s in sites["llama"]
        if s.role != "gate"
    ]
    space = make_space(fused, ["lora"], roles={"lora": (("up",), ("gate",), ("down",))})
    assert first_layer(space) == [
        "decoder.0.ffn.fused_gate_up:lora",
        "decoder.0.ffn.down:lora",
    ]


def test_both_attentions_of_a_decoder_get_slots(sites):
    space = make_space(sites["t5"], ["lora"], roles={"lora": [["q", "v"]]})
    assert ids(space) == [
        "encoder.0.attention.q+v:lora",
        "encoder.1.attention.q+v:lora",
        "decoder.0.attention.q+v:lora",
        "decoder.0.cross_attention.q+v:lora",
        "decoder.1.attention.q+v:lora",
        "decoder.1.cross_attention.q+v:lora",
    ]


def test_order_of_a_group_is_the_order_of_its_sites(sites):
    space = make_space(sites["opt"], ["lora"], roles={"lora": [["v", "q"]]})
    assert [s.role for s in space.slots[0].sites] == ["v", "q"]


@pytest.mark.parametrize("name", TINY)
def test_every_kind_fits_every_family(name, sites):
    kinds = [k for k in KINDS.names() if k != "bitfit" or any(s.has_bias for s in sites[name])]
    space = make_space(sites[name], kinds)
    assert {slot.kind for slot in space} == set(kinds)
    assert len(set(ids(space))) == len(space)
    assert count_params(space.full()) > 0
    for slot in space:
        kind = KINDS.get(slot.kind)
        assert slot.kind in ("bitfit", "lnfit") or all(s.role != "norm" for s in slot.sites)
        if kind.needs_source:
            assert all(site.source for site in slot.sites)
        if not kind.sized:
            assert slot.sizes == (1,)


def test_kinds_that_need_a_source_skip_sites_without(sites):
    no_source = [replace(s, source="") if s.layer == 0 else s for s in sites["bert"]]
    space = make_space(no_source, ["parallel_adapter"])
    assert {slot.layer for slot in space} == {1}


def test_biases_of_a_block_are_one_module(sites):
    assert first_layer(make_space(sites["bert"], ["bitfit", "lnfit"])) == [
        "encoder.0.attention.q+k+v+o+norm:bitfit",
        "encoder.0.ffn.up+down+norm:bitfit",
        "encoder.0.attention.norm:lnfit",
        "encoder.0.ffn.norm:lnfit",
    ]
    assert first_layer(make_space(sites["gpt2"], ["bitfit"])) == [
        "decoder.0.attention.fused_qkv+o+norm:bitfit",
        "decoder.0.ffn.up+down+norm:bitfit",
    ]
    assert first_layer(make_space(sites["qwen2"], ["bitfit"])) == [
        "decoder.0.attention.q+k+v:bitfit"
    ]
    alone = make_space(sites["bert"], ["bitfit"], roles={"bitfit": [["norm"], ["q"]]})
    assert first_layer(alone) == [
        "encoder.0.attention.norm:bitfit",
        "encoder.0.attention.q:bitfit",
        "encoder.0.ffn.norm:bitfit",
    ]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_biases_of_a_model_without_any_are_refused(name, sites):
    with pytest.raises(SiteError, match=r"'bitfit' needs a layer with a bias, .* out of kinds\."):
        make_space(sites[name], ["lora", "bitfit"])


def test_linear_kinds_do_not_go_on_norms(sites):
    with pytest.raises(SiteError, match=r"norm that 'lora' can use; roles present: q, k, .*down\."):
        make_space(sites["bert"], ["lora"], roles={"lora": [["q"], ["norm"]]})


def test_settings_per_kind(sites):
    space = make_space(
        sites["bert"],
        ["lora", "serial_adapter"],
        sizes={"lora": (4, 8), "serial_adapter": 3},
        options={"lora": {"dropout": 0.1, "alpha": 8.0}},
    )
    by_kind = {slot.kind: slot for slot in space}
    assert by_kind["lora"].sizes == (4, 8)
    assert by_kind["lora"].options == (("alpha", 8.0), ("dropout", 0.1))
    assert by_kind["serial_adapter"].sizes == (3,)
    assert by_kind["serial_adapter"].options == ()


@pytest.mark.parametrize("target", [1, 500, 3000, 10_000, 10**9])
def test_target_picks_the_largest_common_width_that_fits(sites, target):
    kinds = ["lora", "serial_adapter", "ia3"]
    space = make_space(sites["bert"], kinds, target_params=target)
    width = {slot.sizes for slot in space if slot.kind != "ia3"}
    assert len(width) == 1
    (size,) = width.pop()
    assert size in (1, 2, 4, 8, 16, 32, 64)
    assert size == 1 or count_params(space.full()) <= target
    if size < 64:
        double = make_space(
            sites["bert"], kinds, sizes={"lora": 2 * size, "serial_adapter": 2 * size}
        )
        assert count_params(double.full()) > target


def test_kinds_with_a_lower_default_size(sites):
    kinds = ["lora", "loretta_rep"]
    for target, sizes in ((None, (16, 8)), (10**9, (64, 8)), (1, (1, 1))):
        space = make_space(sites["bert"], kinds, target_params=target)
        found = {slot.kind: slot.sizes for slot in space}
        assert found == {"lora": (sizes[0],), "loretta_rep": (sizes[1],)}
    given = make_space(sites["bert"], kinds, sizes={"loretta_rep": 32}, target_params=10**9)
    assert {slot.sizes for slot in given if slot.kind == "loretta_rep"} == {(32,)}


def test_target_leaves_given_sizes_alone(sites):
    space = make_space(sites["bert"], sizes={"lora": 5}, target_params=10**9)
    assert {(slot.kind, slot.sizes) for slot in space} == {
        ("lora", (5,)),
        ("serial_adapter", (64,)),
    }


def test_unknown_names_are_refused(sites):
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        make_space(sites["bert"], ["lorra"])
    with pytest.raises(UnknownNameError, match="did you mean 'alpha'"):
        make_space(sites["bert"], ["lora"], options={"lora": {"alfa": 1}})
    with pytest.raises(UnknownNameError, match="did you mean 'serial_adapter'"):
        make_space(sites["bert"], sizes={"serial_adaptr": 4})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": []}, "at least one kind"),
        ({"kinds": ["lora", "lora"]}, "each once"),
        ({"sizes": {"dora": 4}}, "'dora', which is not among the kinds lora, serial_adapter"),
        ({"options": {"ia3": {}}}, "not among the kinds"),
        ({"kinds": ["ia3"], "sizes": {"ia3": 4}}, "'ia3' has no size"),
        ({"sizes": {"lora": (8, 4)}}, "ascending whole numbers"),
        ({"sizes": {"lora": 0}}, "ascending whole numbers"),
        ({"options": {"lora": {"dropout": 2}}}, "lora.dropout must be in"),
        ({"roles": {"lora": [["q", "v"], ["q"]]}}, "names 'q' 2 times"),
    ],
)
def test_settings_that_make_no_sense_are_refused(sites, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_space(sites["bert"], **settings)


def test_a_group_that_matches_nothing_names_the_roles_present(sites):
    with pytest.raises(SiteError, match=r"fused_qkv that 'lora'.*roles present: q, k, v, o, up, d"):
        make_space(sites["bert"], ["lora"], roles={"lora": [["q"], ["fused_qkv"]]})
    with pytest.raises(SiteError, match="did you mean 'down'"):
        make_space(sites["bert"], ["lora"], roles={"lora": [["dowm"]]})
    with pytest.raises(SiteError, match="group\\(s\\) gate"):
        make_space(sites["bert"], ["lora"], roles={"lora": [["gate"]]})
    attention = [s for s in sites["bert"] if s.block == "attention"]
    with pytest.raises(SiteError, match="that 'serial_adapter' can use; roles present: q, k, v, o"):
        make_space(attention)


def test_roles_a_family_lacks_do_not_stop_the_defaults(sites):
    attention = [s for s in sites["bert"] if s.block == "attention"]
    assert len(make_space(attention, ["lora"])) == 3 * LAYERS


def test_paper_space(sites):
    space = paper_space(sites["roberta"])
    assert ids(space) == [
        "encoder.0.attention.q+v:lora",
        "encoder.1.attention.q+v:lora",
        "encoder.0.ffn.down:serial_adapter",
        "encoder.1.ffn.down:serial_adapter",
    ]
    lora, adapter = space.slots[0], space.slots[-1]
    assert (lora.sizes, dict(lora.options)) == ((32,), {"alpha": 32.0, "dropout": 0.1})
    assert (adapter.sizes, dict(adapter.options)) == ((128,), {"dropout": 0.1})


def test_one_kind_is_placed_in_one_line():
    model = TINY["bert"]()
    placement = place(model, "ether_plus", blocks=2, roles=[("q",), ("down",)])
    assert placement.ids == tuple(
        f"encoder.{i}.{home}:ether_plus" for i in range(2) for home in ("attention.q", "ffn.down")
    )
    assert {slot.options for slot in placement} == {(("blocks", 2),)}
    assert set(place(model, "lora", 3).sizes.values()) == {3}
    with pytest.raises(UnknownNameError, match="did you mean 'blocks'"):
        place(model, "ether", block=2)


def test_lora_baseline_is_as_large_as_fits(sites):
    per_rank = LAYERS * 2 * (16 + 16)
    placement = make_lora_baseline(sites["bert"], 5 * per_rank + 3)
    assert set(placement.sizes.values()) == {5}
    assert count_params(placement) == 5 * per_rank
    assert {slot.options for slot in placement} == {(("alpha", 10.0),)}
    assert placement.ids == ("encoder.0.attention.q+v:lora", "encoder.1.attention.q+v:lora")


def test_lora_baseline_with_a_rank_and_alpha(sites):
    placement = make_lora_baseline(sites["bert"], 10_000, rank=2, alpha=16)
    assert set(placement.sizes.values()) == {2}
    assert {slot.options for slot in placement} == {(("alpha", 16.0),)}


@pytest.mark.parametrize("name", TINY)
def test_lora_on_all_roles_reaches_every_layer(name, sites):
    placement = make_lora_baseline(sites[name], 10**6, rank=1, roles=LORA_ALL_ROLES)
    used = [site.path for slot in placement for site in slot.sites]
    assert sorted(used) == sorted(s.path for s in sites[name] if s.role != "norm")
    assert all(len(slot.sites) == 1 for slot in placement)
    space = make_space(sites[name], ["lora"], roles={"lora": LORA_ALL_ROLES})
    assert set(ids(space)) == set(placement.ids)


def test_lora_baseline_that_does_not_fit(sites):
    with pytest.raises(BudgetError, match=r"rank 1 at these sites needs 128 .* allows 127"):
        make_lora_baseline(sites["bert"], 127)
    with pytest.raises(BudgetError, match="rank 4 at these sites needs 512"):
        make_lora_baseline(sites["bert"], 511, rank=4)
    with pytest.raises(BudgetError, match="allows 0"):
        make_lora_baseline(sites["bert"], 0)
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        make_lora_baseline(sites["bert"], 1000, rank=0)


def test_nothing_depends_on_names_the_sites_alone_decide(sites):
    renamed = [replace(s, path=f"x{i}") for i, s in enumerate(sites["bert"])]
    assert ids(make_space(renamed)) == ids(make_space(sites["bert"]))
