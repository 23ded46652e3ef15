"""Trained biases and normalisation layers: counts, worked numbers, exact merging, refusals."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from prunepeft.candidates import make_space
from prunepeft.errors import ConfigError, SiteError
from prunepeft.estimates import estimate_memory
from prunepeft.kinds import count_params, make_kind, n_params, seeded
from prunepeft.sites import find_sites, norm_width
from prunepeft.space import Placement, Slot
from prunepeft.supernet import UnionConfig, attach, slot_parameters
from prunepeft.supernet.norm_scale import scale_offset
from prunepeft.testing.host import PlainHost
from tests.tiny_models import TINY, tiny_inputs

GEMMA = ("gemma", "gemma2", "gemma3")


def placement_of(name: str, *kinds: str) -> Placement:
    sizes = {"lora": 2} if "lora" in kinds else {}
    return make_space(find_sites(TINY[name]()), kinds, sizes=sizes).full()


def make_net(name: str, *kinds: str) -> nn.Module:
    """The supernet of these kinds with random values, in float64."""
    net = attach(TINY[name]().double(), placement_of(name, *kinds)).eval()
    for parameters in slot_parameters(net).values():
        for key, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=seeded(0, key))
            parameter.data += 0.2 * noise.to(parameter)
    return net


def output(name: str, net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(**tiny_inputs(name, net)).logits


# --- counts of real shapes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "kind", "per_layer", "total", "modules"),
    [
        # BERT-base. Biases: q, k, v, o and two norms of 768, up 3072, down 768.
        ("bert", {}, "bitfit", 7 * 768 + 3072, 101_376, 24),
        ("bert", {}, "lnfit", 2 * 2 * 768, 36_864, 24),
        # Llama 7B: two norms of 4096 without a bias in 32 layers.
        ("llama", {}, "lnfit", 2 * 4096, 262_144, 64),
        # T5-large: two norms in an encoder layer, three in a decoder layer.
        ("t5", {"d_model": 1024, "num_layers": 24}, "lnfit", None, 120 * 1024, 120),
        # Qwen2: biases on q, k and v alone.
        ("qwen2", {}, "bitfit", 3 * 4096, 3 * 4096 * 32, 32),
        # Gemma 2: four norms in every layer; two of a block are one module.
        ("gemma2", {}, "lnfit", 4 * 2304, 4 * 2304 * 26, 52),
    ],
)
def test_counts_by_hand(
    family: str, settings: dict, kind: str, per_layer: int | None, total: int, modules: int
) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    space = make_space(find_sites(model), [kind])
    assert count_params(space.full()) == total
    assert len(space) == modules
    first = sum(n_params(slot, 1) for slot in space if slot.layer == 0)
    assert per_layer is None or first == per_layer


# --- numbers worked by hand ---------------------------------------------------------------------


def test_bitfit_by_hand() -> None:
    kind, params = make_kind("bitfit"), {"db": torch.tensor([0.5, -1.0])}
    x, y = torch.full((3, 4), torch.nan), torch.ones(3, 2)
    delta = kind.delta(params, x, y, 1.0, PlainHost(torch.ones(2, 4)))
    assert_close(delta, torch.tensor([[0.5, -1.0]] * 3))
    weight, bias = torch.ones(2, 4), torch.tensor([1.0, 2.0])
    assert_close(kind.merged(weight, bias, params, 1.0, "add"), (weight, torch.tensor([1.5, 1.0])))


def test_lnfit_by_hand() -> None:
    """A layer norm of scale (2, 1) and bias (1, 3); its input (0, 2) is normalised to (-1, 1)."""
    norm = nn.LayerNorm(2, eps=0.0)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])
    model = nn.ModuleDict({"layers": nn.ModuleList([_block(norm), _block(nn.LayerNorm(2))])})
    space = make_space(find_sites(model), ["lnfit"])
    layer = attach(model, space.full()).base_model.model["layers"][0]["norm"]
    x = torch.tensor([[0.0, 2.0]])
    assert_close(layer(x), torch.tensor([[-1.0, 4.0]]))
    params = layer.params("default", "lnfit")
    params["g"].data, params["db"].data = torch.tensor([3.0, 0.5]), torch.tensor([0.1, -1.0])
    expected = torch.tensor([[-6.0 + 1.1, 0.5 + 2.0]])  # g s n + b + db
    assert_close(layer(x), expected)
    layer.merge()
    assert_close(norm.weight.data, torch.tensor([6.0, 0.5]))
    assert_close(norm.bias.data, torch.tensor([1.1, 2.0]))
    assert_close(layer(x), expected)
    layer.unmerge()
    assert norm.weight.tolist() == [2.0, 1.0]
    assert norm.bias.tolist() == [1.0, 3.0]


def _block(norm: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"norm": norm, "fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_how_a_norm_stores_its_scale_is_found(name: str) -> None:
    norms = [m for m in TINY[name]().modules() if norm_width(m)]
    assert norms
    assert {scale_offset(norm) for norm in norms} == {float(name in GEMMA)}
    assert {scale_offset(norm.bfloat16()) for norm in norms} == {float(name in GEMMA)}


def test_a_norm_of_another_scale_is_not_merged() -> None:
    class ExpRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight.exp())

    with pytest.raises(ConfigError, match="ExpRMSNorm scales by neither its weight nor 1"):
        scale_offset(ExpRMSNorm(4))


@pytest.mark.parametrize("name", TINY)
def test_merged_norms_hold_the_trained_scale_and_bias(name: str) -> None:
    net = make_net(name, "lnfit")
    base, expected = TINY[name]().double(), output(name, net)
    merged = net.merge_and_unload()
    for slot, values in slot_parameters(make_net(name, "lnfit")).items():
        assert slot.endswith(":lnfit")
        for key, value in values.items():
            path, _, tensor = key.rpartition(".")
            old, new = base.get_submodule(path), merged.get_submodule(path)
            if tensor == "db":
                assert_close(new.bias, old.bias + value)
            else:
                offset = 1 if name in GEMMA else 0
                assert_close(new.weight + offset, (old.weight + offset) * value)
    assert_close(output(name, merged), expected, rtol=0, atol=1e-5)  # some norms run in float32
    assert not torch.allclose(output(name, base), expected, atol=1e-3)


def test_half_precision_does_not_round_one_plus_weight() -> None:
    """1 + w has no room in bfloat16 for a w of 2^-9, so the sum must be made in float32."""
    model = TINY["gemma"]().bfloat16()
    norm = model.model.layers[0].input_layernorm
    norm.weight.data.fill_(2.0**-9)
    net = attach(model, placement_of("gemma", "lnfit"))
    net.merge_adapter()
    assert norm.weight.tolist() == [2.0**-9] * 16


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "qwen2", "vit"])
def test_all_kinds_on_one_layer_merge_together(name: str) -> None:
    net = make_net(name, "lora", "ia3", "bitfit", "lnfit")
    expected = output(name, net)
    net.merge_adapter()
    assert_close(output(name, net), expected, rtol=0, atol=1e-9)
    net.unmerge_adapter()
    assert_close(output(name, net), expected, rtol=0, atol=0)


def test_two_active_adapters_merge_together() -> None:
    net = make_net("bert", "bitfit", "lnfit")
    net.add_adapter("other", UnionConfig(placement=placement_of("bert", "bitfit", "lnfit")))
    net.base_model.set_adapter(["default", "other"])
    for name, parameter in net.named_parameters():
        if name.endswith(".other"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=seeded(1, name))
    expected = output("bert", net)
    merged = copy.deepcopy(net).merge_and_unload(adapter_names=["default", "other"])
    assert_close(output("bert", merged), expected, rtol=0, atol=1e-9)


def gradients(name: str, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base model with its own gradients, and those of the fresh modules on it."""
    base = TINY[name]().double()
    net = attach(TINY[name]().double(), placement_of(name, kind)).eval()
    for model in (base, net):
        model(**tiny_inputs(name, model)).logits.square().sum().backward()
    slots = slot_parameters(net).values()
    return base, {key: p.grad for values in slots for key, p in values.items()}


def test_the_gradient_of_db_is_that_of_the_bias() -> None:
    base, found = gradients("bert", "bitfit")
    for key, gradient in found.items():
        assert_close(gradient, base.get_submodule(key.removesuffix(".db")).bias.grad)


def test_the_gradient_of_g_is_that_of_the_scale_times_the_scale() -> None:
    base, found = gradients("gemma", "lnfit")
    for key, gradient in found.items():
        weight = base.get_submodule(key.removesuffix(".g")).weight
        expected = weight.grad * (1 + weight)
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)  # gemma's norms run in float32


# --- what does not fit --------------------------------------------------------------------------


def test_a_placement_of_another_model_is_refused() -> None:
    model = TINY["bert"]()
    by_role = {s.role: s for s in find_sites(model)}
    wrong = [
        ("lora", replace(by_role["norm"], role="q")),
        ("lnfit", replace(by_role["o"], role="norm")),
    ]
    for kind, site in wrong:
        with pytest.raises(SiteError, match="here, but the placement was made for role"):
            attach(model, Placement({Slot((site,), kind, (1,)): 1}))
    norm = next(s for s in find_sites(TINY["llama"]()) if s.role == "norm")
    slot = Slot((replace(norm, has_bias=True),), "bitfit", (1,))
    with pytest.raises(SiteError, match="role 'norm', bias: True"):
        attach(TINY["llama"](), Placement({slot: 1}))


def test_norms_without_a_weight_carry_nothing() -> None:
    config = AutoConfig.for_model("olmo", num_hidden_layers=2)
    with torch.device("meta"):
        sites = find_sites(AutoModel.from_config(config))
    with pytest.raises(SiteError, match="'lnfit' needs a normalisation layer with a scale"):
        make_space(sites, ["lnfit"])


def test_a_kind_of_linear_layers_is_refused_on_a_norm() -> None:
    model = TINY["bert"]()
    norm = next(s for s in find_sites(model) if s.role == "norm")
    placement = Placement({Slot((norm,), "lora", (2,)): 2})
    with pytest.raises(SiteError, match=r"'lora' needs a linear layer; .*LayerNorm' is no such"):
        attach(model, placement)


def test_norms_do_not_change_the_estimate_of_memory() -> None:
    train = SimpleNamespace(
        max_length=16, batch_size=4, gradient_accumulation=1, gradient_checkpointing=False
    )
    config = SimpleNamespace(device="cpu", shard=False, train=train)
    known = {"config": config, "storage": None, "uses_bf16": lambda device: False}
    sites = find_sites(TINY["bert"]())
    linear = [s for s in sites if s.role != "norm"]
    with_norms, without = (
        SimpleNamespace(**known, sites=s, n_base=10, n_tokens=16) for s in (sites, linear)
    )
    assert len(linear) < len(sites)
    assert estimate_memory(with_norms, 1) == estimate_memory(without, 1)
