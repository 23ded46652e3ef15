"""The union on one model: adapters beside each other, copies, changes in place and refusals."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.errors import CheckpointError, ConfigError, SiteError, StateError
from prunepeft.kinds import count_params, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, SearchSpace
from prunepeft.supernet import (
    UnionConfig,
    attach,
    detach,
    gate_slots,
    load_trainable_state,
    n_trainable,
    placement_of,
    remove_slots,
    reset_slots,
    shrink_slot,
    slot_layers,
    slot_parameters,
    trainable_state,
)
from prunepeft.supernet.layer import UnionLayer
from tests.tiny_models import TINY, tiny_inputs

KINDS = ("lora", "serial_adapter", "parallel_adapter")


def make_placement(kinds: tuple[str, ...] = KINDS) -> Placement:
    sites, sizes = find_sites(TINY["bert"]()), dict.fromkeys(kinds, 4)
    return make_space(sites, kinds, sizes=sizes, options={"lora": {"alpha": 12.0}}).full()


def make_net(seed: int = 0, *, head: bool = True) -> PeftModel:
    modules = ["classifier"] if head else None
    return attach(TINY["bert"](), make_placement(), seed=seed, modules_to_save=modules).eval()


def output(net) -> Tensor:
    with torch.no_grad():
        return net(**tiny_inputs("bert", net)).logits


def perturb(net: PeftModel, seed: int = 0) -> PeftModel:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad or ".union_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(seed, name))
    return net


# --- several adapters and copies ----------------------------------------------------------------


def test_two_adapters_do_not_disturb_each_other():
    net = make_net()
    other = make_placement(("lora", "serial_adapter"))
    net.add_adapter("other", UnionConfig(placement=other.to_dict(), init_seed=3))
    perturb(net)
    first = output(net)
    net.set_adapter("other")
    second = output(net)
    assert not torch.allclose(first, second)
    assert placement_of(net, "other") == other
    remove_slots(net, placement_of(net).ids[::2])
    assert_close(output(net), second, rtol=0, atol=0)
    remove_slots(net, placement_of(net, "other").ids[1:], "other")
    assert len(placement_of(net, "other")) == 1
    assert len(placement_of(net)) > 1
    net.delete_adapter("other")
    net.set_adapter("default")
    assert list(net.peft_config) == ["default"]
    assert not any("other" in name for name in net.state_dict())


def test_both_adapters_are_saved_and_loaded(tmp_path: Path):
    net = make_net()
    net.add_adapter("other", UnionConfig(placement=make_placement(("lora",)).to_dict()))
    perturb(net)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["bert"](), tmp_path).eval()
    loaded.load_adapter(str(tmp_path / "other"), "other")
    for adapter in ("default", "other"):
        net.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert_close(output(loaded), output(net), rtol=0, atol=0)


def test_a_disabled_adapter_is_the_base_model():
    expected = output(TINY["bert"]())
    net = perturb(make_net(head=False))
    assert not torch.allclose(output(net), expected)
    with net.disable_adapter():
        assert_close(output(net), expected, rtol=0, atol=0)


def test_a_deep_copy_lives_alone():
    net = perturb(make_net())
    expected = output(net)
    twin = copy.deepcopy(net)
    assert_close(output(twin), expected, rtol=0, atol=0)
    perturb(twin, seed=1)
    remove_slots(twin, placement_of(twin).ids[::2])
    assert len(placement_of(net)) == len(make_placement())
    assert_close(output(net), expected, rtol=0, atol=0)
    own = {id(p) for p in net.parameters()}
    assert not own & {id(p) for p in twin.parameters()}
    taps = [
        [m.tap for m in n.modules() if isinstance(m, UnionLayer) and m.tap] for n in (net, twin)
    ]
    assert taps[0]
    assert not {id(t) for t in taps[0]} & {id(t) for t in taps[1]}
    detach(twin)
    assert_close(output(net), expected, rtol=0, atol=0)


def test_a_copy_still_reads_its_own_input():
    net = perturb(make_net())
    twin = pickle.loads(pickle.dumps(net))
    assert_close(output(twin), output(net), rtol=0, atol=0)


# --- changes in place ---------------------------------------------------------------------------


def test_reset_gives_the_first_values_of_a_seed_in_place():
    net = make_net(seed=0)
    fresh = trainable_state(net)
    parameters = {n: p for ps in slot_parameters(net).values() for n, p in ps.items()}
    perturb(net)
    reset_slots(net, 5)
    expected = slot_parameters(make_net(seed=5))
    assert_close(slot_parameters(net), expected, rtol=0, atol=0)
    again = {n: p for ps in slot_parameters(net).values() for n, p in ps.items()}
    assert all(again[n] is p for n, p in parameters.items())
    reset_slots(net, 0)
    found = trainable_state(net)
    assert all(torch.equal(found[n], fresh[n]) for n in fresh if "union_" in n)


def test_first_values_do_not_depend_on_the_other_modules():
    full, placement = slot_parameters(make_net()), make_placement()
    for slot_id in placement.ids[::3]:
        alone = placement.without(set(placement.ids) - {slot_id})
        found = slot_parameters(attach(TINY["bert"](), alone))
        assert_close(found[slot_id], full[slot_id], rtol=0, atol=0)


def test_removal_leaves_no_trace_of_the_module():
    net = make_net(head=False)
    remove_slots(net, placement_of(net).ids[:-1])
    layers = [m for m in net.modules() if isinstance(m, UnionLayer)]
    assert len(layers) == 1
    assert n_trainable(net) == (count_params(placement_of(net)), 0)
    assert len(slot_layers(net)) == 1
    hooks = sum(len(m._forward_pre_hooks) for m in net.modules())
    assert hooks == sum(layer.tap is not None for layer in layers)
    remove_slots(net, placement_of(net).ids)
    assert not any(isinstance(m, UnionLayer) for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_cutting_twice_keeps_the_scaling():
    net = perturb(make_net())
    slot_id = placement_of(net).ids[0]
    shrink_slot(net, slot_id, torch.tensor([0, 1, 3]))
    shrink_slot(net, slot_id, torch.tensor([1, 2]))
    sizes = {s.id: n for s, n in placement_of(net).sizes.items()}
    assert sizes[slot_id] == 2
    once = perturb(make_net())
    shrink_slot(once, slot_id, torch.tensor([1, 3]))
    assert_close(output(net), output(once), rtol=0, atol=0)
    (layer, kind), *_ = slot_layers(net)[slot_id]
    slot = next(s for s in placement_of(net) if s.id == slot_id)
    assert layer.branches["default"][kind].scaling == 12.0 / 4  # the largest rank
    assert slot.sizes == (4,)


def test_trainable_state_round_trip_and_what_does_not_fit():
    net, other = perturb(make_net()), make_net(seed=9)
    load_trainable_state(other, trainable_state(net))
    assert_close(output(other), output(net), rtol=0, atol=0)
    smaller = make_net(seed=9)
    remove_slots(smaller, placement_of(smaller).ids[:2])
    with pytest.raises(StateError, match="saved values do not fit the model"):
        load_trainable_state(smaller, trainable_state(net))
    load_trainable_state(smaller, trainable_state(net), strict=False)
    remove_slots(net, placement_of(net).ids[:2])
    assert_close(output(smaller), output(net), rtol=0, atol=0)
    with pytest.raises(StateError, match="missing"):
        load_trainable_state(other, trainable_state(net), strict=False)


def test_merging_a_gated_module_is_refused():
    net = attach(TINY["bert"](), make_placement(("lora",)))
    gate_slots(net, {placement_of(net).ids[0]: 0.5})
    with pytest.raises(StateError, match="set its gate back to 1"):
        net.merge_adapter()


def test_detach_after_a_merge_restores_the_weights():
    base = TINY["bert"]()
    before = copy.deepcopy(base.state_dict())
    net = perturb(attach(base, make_placement(("lora",)), modules_to_save=["classifier"]))
    net.merge_adapter()
    assert_close(detach(net).state_dict(), before, rtol=0, atol=0)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda net: remove_slots(net, ["encoder.9.ffn.down:lora"]), "are not on this model"),
        (lambda net: gate_slots(net, {"nothing": 0.0}), "are not on this model"),
        (lambda net: shrink_slot(net, make_placement().ids[0], torch.tensor([])), "has ranks 0..3"),
        (lambda net: shrink_slot(net, make_placement().ids[0], torch.tensor([4])), "has ranks 0.."),
    ],
)
def test_wrong_changes_are_refused_and_change_nothing(change, match):
    net = perturb(make_net())
    expected = output(net)
    with pytest.raises(ConfigError, match=match):
        change(net)
    assert placement_of(net) == make_placement()
    assert_close(output(net), expected, rtol=0, atol=0)


def test_a_placement_of_another_model_is_refused():
    with pytest.raises(SiteError, match="which this model lacks"):
        attach(TINY["llama"](), make_placement())
    with pytest.raises(SiteError, match="was made for 16 to 16"):
        attach(TINY["bert"](hidden_size=32), make_placement())


def test_an_empty_placement_and_another_adapter_are_refused():
    with pytest.raises(ConfigError, match="the placement is empty"):
        attach(TINY["bert"](), Placement())
    with pytest.raises(ConfigError, match="bias must be 'none'"):
        UnionConfig(placement=make_placement().to_dict(), bias="all")
    with pytest.raises(StateError, match="adapter 'missing' is not a prunepeft union"):
        placement_of(make_net(), "missing")


def test_a_checkpoint_with_tensors_missing_is_refused(tmp_path: Path):
    net = make_net()
    net.save_pretrained(tmp_path)
    smaller = make_placement().without(make_placement().ids[:1])
    net.peft_config["default"].set_placement(smaller)
    net.peft_config["default"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected .* damaged or was edited"):
        PeftModel.from_pretrained(TINY["bert"](), tmp_path)


def test_the_config_accepts_a_placement_and_repeats_no_head(tmp_path: Path):
    placement = make_placement()
    net = get_peft_model(
        TINY["bert"](), UnionConfig(placement=placement, modules_to_save=["classifier"])
    )
    assert placement_of(net) == placement
    for _ in range(3):
        net.save_pretrained(tmp_path)
        net = PeftModel.from_pretrained(TINY["bert"](), tmp_path)
    assert net.peft_config["default"].to_dict()["modules_to_save"].count("classifier") == 1
    assert SearchSpace(tuple(placement)).full() == placement
