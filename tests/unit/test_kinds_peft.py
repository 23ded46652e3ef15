"""LoRA, DoRA and IA3 equal peft's own layers: outputs and gradients, dropout included."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from prunepeft.kinds import KINDS, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site, Slot
from prunepeft.supernet import attach, slot_parameters
from tests.tiny_models import TINY, tiny_inputs

LOW_RANK = ("q", "v", "o", "up", "down")
NAMES = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector", "l": "ia3_l"}


def make_pair(
    name: str, kind: str, options: dict, roles: tuple[str, ...], config: Callable[..., PeftConfig]
) -> tuple[PeftModel, PeftModel, dict]:
    """Our net and peft's on the same model, and the inputs; all sites of these roles, size 4."""
    model = TINY[name]().double()
    sites = [s for s in find_sites(model) if s.role in roles]
    sizes = (4,) if KINDS.get(kind).sized else (1,)
    slots = [Slot((s,), kind, sizes, tuple(sorted(options.items()))) for s in sites]
    ours = attach(copy.deepcopy(model), Placement({s: s.sizes[-1] for s in slots}))
    theirs = get_peft_model(copy.deepcopy(model), config(sites))
    return ours.eval(), theirs.eval(), tiny_inputs(name, model)


def copy_values(
    ours: PeftModel, theirs: PeftModel, names: dict[str, str]
) -> dict[str, nn.Parameter]:
    """Give both the same random values; returns our `<path>.<tensor>` -> their parameter."""
    twins = {}
    for parameters in slot_parameters(ours).values():
        for full_name, parameter in parameters.items():
            path, _, tensor = full_name.rpartition(".")
            container = getattr(theirs.base_model.model.get_submodule(path), names[tensor])
            twin = container["default"]
            twin = twin if isinstance(twin, nn.Parameter) else twin.weight
            noise = torch.randn(parameter.shape, generator=seeded(0, full_name))
            parameter.data += 0.2 * noise
            twin.data = parameter.detach().clone().reshape(twin.shape)
            twins[full_name] = twin
    return twins


def assert_twins(ours: PeftModel, theirs: PeftModel, inputs: dict, twins: dict) -> None:
    outputs = []
    for net in (ours, theirs):
        torch.manual_seed(0)  # the same dropout masks
        outputs.append(net(**inputs).logits)
        outputs[-1].square().sum().backward()
    assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    for parameters in slot_parameters(ours).values():
        for name, parameter in parameters.items():
            expected = twins[name].grad.reshape(parameter.shape)
            assert expected.abs().max() > 0
            assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_low_rank_kinds_equal_peft(name: str, kind: str, rslora: bool, training: bool) -> None:
    def config(sites: list[Site]) -> PeftConfig:
        return LoraConfig(
            r=4,
            lora_alpha=6,
            lora_dropout=0.3,
            use_rslora=rslora,
            use_dora=kind == "dora",
            target_modules=[s.path for s in sites],
        )

    options = {"alpha": 6.0, "dropout": 0.3, "rslora": rslora}
    ours, theirs, inputs = make_pair(name, kind, options, LOW_RANK, config)
    twins = copy_values(ours, theirs, NAMES)
    assert_twins(ours.train(training), theirs.train(training), inputs, twins)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ia3_equals_peft(name: str) -> None:
    def config(sites: list[Site]) -> PeftConfig:
        downs = [s.path for s in sites if s.role == "down"]
        return IA3Config(target_modules=[s.path for s in sites], feedforward_modules=downs)

    ours, theirs, inputs = make_pair(name, "ia3", {}, ("k", "v", "down"), config)
    twins = copy_values(ours, theirs, NAMES)
    assert_twins(ours, theirs, inputs, twins)
