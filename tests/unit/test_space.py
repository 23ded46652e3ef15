import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.errors import ConfigError
from prunepeft.space import (
    BLOCKS,
    MAX_SLOTS,
    ROLES,
    Placement,
    SearchSpace,
    Site,
    Slot,
)

SITE = Site("enc.0.q", "encoder", 0, 4, "attention", "q", 8, 6)
VALUE = replace(SITE, path="enc.0.v", role="v")

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
options = st.dictionaries(names, st.one_of(st.booleans(), st.integers(-9, 9), names), max_size=3)


@st.composite
def placements(draw):
    """Placements with at most one slot per layer and block, so that ids never collide."""
    sizes = {}
    n_layers = draw(st.integers(1, 6))
    for layer in draw(st.sets(st.integers(0, n_layers - 1))):
        block = draw(st.sampled_from(BLOCKS))
        roles = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=3, unique=True))
        sites = tuple(
            Site(f"m.{layer}.{role}", "decoder", layer, n_layers, block, role, 4, 5, "m.x")
            for role in roles
        )
        allowed = tuple(sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=3))))
        slot = Slot(sites, draw(names), allowed, tuple(sorted(draw(options).items())))
        sizes[slot] = draw(st.integers(1, allowed[-1]))
    return Placement(sizes)


@given(placements())
def test_a_placement_survives_json(placement):
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert again == placement
    assert again.digest == placement.digest
    assert hash(again) == hash(placement)
    assert list(again) == list(placement)


@given(placements())
def test_every_slot_survives_json_and_has_its_own_id(placement):
    for slot in placement:
        assert Slot.from_dict(json.loads(json.dumps(slot.to_dict()))) == slot
    assert len(set(placement.ids)) == len(placement)


@given(placements())
def test_without_removes_exactly_these(placement):
    gone = set(placement.ids[::2])
    rest = placement.without(gone)
    assert set(rest.ids) == set(placement.ids) - gone
    assert len(placement) == len(rest) + len(gone)
    assert placement.without(()) == placement


@given(placements())
def test_digest_tells_sizes_apart(placement):
    for slot, size in placement.sizes.items():
        if size > 1:
            smaller = Placement(dict(placement.sizes) | {slot: size - 1})
            assert smaller.digest != placement.digest


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [
        (6, [0, 0, 1, 2, 2, 3]),
        (12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
        (24, [0] * 5 + [1] * 7 + [2] * 8 + [3] * 4),
        (1, [0]),
    ],
)
def test_depth_blocks(n_layers, expected):
    sites = [replace(SITE, layer=i, n_layers=n_layers) for i in range(n_layers)]
    assert [s.depth_block for s in sites] == expected


def test_slot_names():
    slot = Slot((SITE, VALUE), "lora", (8, 16))
    assert slot.id == "encoder.0.attention.q+v:lora"
    assert slot.partition == "encoder.0.lora"
    assert slot.layer == 0
    other = Slot((replace(SITE, role="other"),), "lora", (8,))
    assert other.id == "encoder.0.attention.enc.0.q:lora"


def test_slots_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="at least one site"):
        Slot((), "lora", (1,))
    with pytest.raises(ConfigError, match="must share stack, layer and block"):
        Slot((SITE, replace(VALUE, layer=1)), "lora", (1,))
    for sizes in ((), (0,), (4, 2), (2, 2), (True,), (2.0,)):
        with pytest.raises(ConfigError, match="ascending whole numbers"):
            Slot((SITE,), "lora", sizes)


def test_placements_that_make_no_sense_are_refused():
    slot = Slot((SITE,), "lora", (8,))
    for size in (0, 9, -1, True, 2.0, "4", None):
        with pytest.raises(ConfigError, match=r"must be in 1\.\.8"):
            Placement({slot: size})
    tied = Slot((SITE, VALUE), "lora", (8,))
    with pytest.raises(ConfigError, match=r"two slots put 'lora' on enc\.0\.q"):
        Placement({slot: 1, tied: 1})
    with pytest.raises(ConfigError, match="occurs twice"):
        Placement({slot: 1, replace(slot, sizes=(4,)): 1})


def test_search_space_is_the_supernet_of_its_slots():
    first, second = Slot((SITE,), "lora", (4, 8)), Slot((SITE,), "ia3", (1,))
    space = SearchSpace((first, second))
    assert dict(space.full().sizes) == {first: 8, second: 1}
    assert list(space) == [first, second]
    assert space.by_id() == {first.id: first, second.id: second}
    assert space.full().kinds == ("ia3", "lora")
    with pytest.raises(ConfigError, match="at least one slot"):
        SearchSpace(())


def good():
    return Placement({Slot((SITE, VALUE), "lora", (8,), (("alpha", 2.0),)): 4}).to_dict()


def slot_of(data):
    return data["slots"][0]


HOSTILE_SITES = {
    "path": ["../../etc/passwd", "a\0b", 3, None, ["a"]],
    "stack": [1, "a..b", None],
    "block": ["head", "", 0],
    "role": ["lm_head", "", {}],
    "layer": [-1, 4, 10**9, 0.0, "0", True],
    "n_layers": [0, 2**31, 10**9 * 10**9, "4", None],
    "d_in": [-1, 2**31, 10**18, 8.0, float("inf"), "8", False],
    "d_out": [-1, 2**31, float("nan"), []],
    "source": ["..", "\0", 1, None],
    "has_bias": [1, 0, "true", None, []],
}
CASES = [(key, value) for key, values in HOSTILE_SITES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_hostile_sites_are_refused(key, value):
    data = good()
    slot_of(data)["sites"][0][key] = value
    with pytest.raises(ConfigError, match="site"):
        Placement.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sites", []),
        ("sites", {}),
        ("sites", [None]),
        ("sites", ["enc.0.q"]),
        ("sites", 10**9),
        ("sizes", 8),
        ("sizes", []),
        ("sizes", ["8"]),
        ("sizes", [8, 4]),
        ("sizes", [None]),
        ("sizes", [[8]]),
        ("options", []),
        ("options", {"alpha": [1]}),
        ("options", {"alpha": {"__class__": "x"}}),
        ("kind", 1),
        ("kind", None),
        ("size", 0),
        ("size", 9),
        ("size", 10**9),
        ("size", "4"),
        ("size", None),
        ("size", [4]),
    ],
)
def test_hostile_slots_are_refused(key, value):
    data = good()
    slot_of(data)[key] = value
    with pytest.raises(ConfigError):
        Placement.from_dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "must be a mapping; got NoneType"),
        ([], "must be a mapping; got list"),
        ("{}", "must be a mapping; got str"),
        ({}, "missing keys"),
        ({"format_version": 1}, "missing keys"),
        ({"format_version": 2, "slots": []}, "Install a newer prunepeft"),
        ({"format_version": 1, "slots": {}}, "at most 100000 slots"),
        ({"format_version": 1, "slots": 10**9}, "at most 100000 slots"),
        ({"format_version": 1, "slots": [], "n": 1}, r"unknown keys \['n'\]"),
        ({"format_version": 1, "slots": [None]}, "a slot must be a mapping"),
        ({"format_version": 1, "slots": [{}]}, "slot: missing keys"),
    ],
)
def test_hostile_placements_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        Placement.from_dict(data)


def test_claims_of_too_many_slots_are_refused_before_they_are_read():
    with pytest.raises(ConfigError, match="at most"):
        Placement.from_dict({"format_version": 1, "slots": [None] * (MAX_SLOTS + 1)})


def test_unknown_and_missing_keys_are_named():
    data = good()
    slot_of(data)["sites"][0]["weight"] = 1
    del slot_of(data)["sites"][0]["layer"]
    with pytest.raises(ConfigError, match=r"missing keys \['layer'\], unknown keys \['weight'"):
        Placement.from_dict(data)


def test_a_site_written_before_biases_were_known_is_read():
    data = good()
    for site in slot_of(data)["sites"]:
        del site["has_bias"]
    assert Placement.from_dict(data) == Placement.from_dict(good())
    slot_of(data)["sites"][0]["has_bias"] = True
    assert Placement.from_dict(data) != Placement.from_dict(good())


def test_the_same_slot_twice_is_refused():
    data = good()
    data["slots"] *= 2
    with pytest.raises(ConfigError, match="occurs twice"):
        Placement.from_dict(data)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data(), json_values)
def test_any_value_anywhere_is_read_or_refused_with_a_typed_error(data, value):
    """Replace one place of a good file by anything: the result is a placement or a ConfigError."""
    document = good()
    homes = [document, slot_of(document), slot_of(document)["sites"][0]]
    home = data.draw(st.sampled_from(homes))
    home[data.draw(st.sampled_from(sorted(home)))] = value
    try:
        placement = Placement.from_dict(document)
    except ConfigError:
        return
    assert Placement.from_dict(placement.to_dict()) == placement
