"""All kinds together on one model of every family: masked, removed, absent, saved, merged, cut."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.kinds import count_params, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement
from prunepeft.supernet import (
    attach,
    detach,
    gate_slots,
    n_trainable,
    placement_of,
    remove_slots,
    shrink_slot,
    slot_parameters,
    trainable_state,
)
from tests.tiny_models import TINY, tiny_inputs

FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen2", "opt", "t5", "vit")
HEADS = {"bert": "classifier", "roberta": "classifier", "vit": "classifier"}
MIXED = ("lora", "ia3", "serial_adapter", "parallel_adapter")
MERGEABLE = ("lora", "dora", "ia3")
SIZES = {"lora": 3, "dora": 3, "serial_adapter": 4, "parallel_adapter": 5}


@cache
def base_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = TINY[name]()
    return model, tiny_inputs(name, model)


def make_base(name: str) -> nn.Module:
    return copy.deepcopy(base_and_inputs(name)[0]).eval()


def make_placement(name: str, kinds: tuple[str, ...] = MIXED) -> Placement:
    sites = find_sites(base_and_inputs(name)[0])
    return make_space(sites, kinds, sizes={k: SIZES[k] for k in kinds if k in SIZES}).full()


def make_net(name: str, placement: Placement | None = None, **kwargs) -> PeftModel:
    return attach(make_base(name), placement or make_placement(name), seed=7, **kwargs).eval()


def perturb(net: PeftModel) -> PeftModel:
    """Noise that depends on a tensor's name alone."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(1, name))
    return net


def output(name: str, net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(**base_and_inputs(name)[1]).logits


def take_steps(name: str, net: PeftModel, steps: int = 3) -> None:
    """Gradient descent on the square of the logits."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        net(**base_and_inputs(name)[1]).logits.square().mean().backward()
        optimizer.step()


def some_of(net: PeftModel) -> list[str]:
    """Slots of every kind, but not all of any."""
    ids = placement_of(net).ids
    return [i for k in MIXED for i in [i for i in ids if i.endswith(f":{k}")][::2]]


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_removed_is_absent(name):
    gated, removed = perturb(make_net(name)), perturb(make_net(name))
    some = some_of(gated)
    assert {i.rpartition(":")[2] for i in some} == set(MIXED)
    full = output(name, gated)
    gate_slots(gated, dict.fromkeys(some, 0.0))
    remove_slots(removed, some)
    absent = perturb(make_net(name, make_placement(name).without(some)))
    assert placement_of(removed) == placement_of(absent)
    assert_close(output(name, gated), output(name, removed), rtol=0, atol=1e-6)
    assert_close(output(name, removed), output(name, absent), rtol=0, atol=1e-6)
    assert (output(name, removed) - full).abs().max() > 1e-4
    gate_slots(gated, dict.fromkeys(some, 1.0))
    assert_close(output(name, gated), full, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_trains_as_if_built_without(name):
    pruned = make_net(name)
    some = some_of(pruned)
    remove_slots(pruned, some)
    built = make_net(name, make_placement(name).without(some))
    assert_close(trainable_state(pruned), trainable_state(built), rtol=0, atol=0)
    fresh = output(name, built)
    assert_close(output(name, pruned), fresh, rtol=0, atol=1e-6)
    take_steps(name, pruned)
    take_steps(name, built)
    assert (output(name, built) - fresh).abs().max() > 1e-4
    assert_close(output(name, pruned), output(name, built), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_and_cut_in_training_is_saved_and_loaded(name, tmp_path: Path):
    head = [HEADS[name]] if name in HEADS else None
    net = make_net(name, modules_to_save=head)
    take_steps(name, net)
    remove_slots(net, some_of(net))
    for slot in list(placement_of(net)):
        if slot.kind != "ia3":
            shrink_slot(net, slot.id, torch.tensor([0, 2]))
    take_steps(name, net)
    own, in_head = n_trainable(net)
    assert own == count_params(placement_of(net))
    assert (in_head > 0) == (head is not None)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(name), tmp_path).eval()
    assert placement_of(loaded) == placement_of(net)
    assert_close(output(name, loaded), output(name, net), rtol=0, atol=0)
    again = PeftModel.from_pretrained(make_base(name), tmp_path, is_trainable=True)
    assert_close(trainable_state(again), trainable_state(net), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_is_unmerged(name):
    net = perturb(make_net(name, make_placement(name, MERGEABLE)))
    expected = output(name, net)
    assert (expected - output(name, make_base(name))).abs().max() > 1e-3
    merged = copy.deepcopy(net).merge_and_unload()
    assert type(merged) is type(base_and_inputs(name)[0])
    assert_close(output(name, merged), expected, rtol=0, atol=1e-5)
    net.merge_adapter()
    assert_close(output(name, net), expected, rtol=0, atol=1e-5)
    net.unmerge_adapter()
    assert_close(output(name, net), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_base_is_bit_identical_after_training_and_detach(name):
    base = make_base(name)
    frozen = next(iter(base.parameters()))
    frozen.requires_grad_(False)  # what the user froze stays frozen
    before = copy.deepcopy(base.state_dict())
    trainable = {n for n, p in base.named_parameters() if p.requires_grad}
    modules = {n: id(m) for n, m in base.named_modules()}
    expected = output(name, base)
    head = [HEADS[name]] if name in HEADS else None
    net = attach(base, make_placement(name), modules_to_save=head)
    net.gradient_checkpointing_enable({"use_reentrant": False})
    take_steps(name, net)
    remove_slots(net, some_of(net))
    take_steps(name, net)
    assert detach(net) is base
    base.gradient_checkpointing_disable()
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert {n for n, p in base.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in base.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert not getattr(base, "_hf_peft_config_loaded", False)
    assert_close(base.state_dict(), before, rtol=0, atol=0)
    assert_close(output(name, base.eval()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_kinds_in_bfloat16_and_with_checkpointing(name):
    inputs = base_and_inputs(name)[1]
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    net = perturb(attach(make_base(name).bfloat16(), make_placement(name), seed=7))
    net.gradient_checkpointing_enable({"use_reentrant": False})
    logits = net.train()(**inputs).logits
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    gradients = [p.grad for ps in slot_parameters(net).values() for p in ps.values()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache(name):
    net = perturb(make_net(name))
    net.base_model.model.config.use_cache = True
    prompt = {"input_ids": torch.tensor([[5, 9, 33, 21]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    length = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = net.generate(**prompt, use_cache=True, **length)
    assert cached.shape == (1, 12)
    torch.testing.assert_close(net.generate(**prompt, use_cache=False, **length), cached)
    plain = make_base(name).generate(**prompt, use_cache=True, **length)
    assert not torch.equal(plain, cached)  # the modules are active while generating
