"""Every kind keeps the contract of `KindContract` on every family of model."""

import copy
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close

from prunepeft.kinds import KINDS
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Slot
from prunepeft.supernet import UnionConfig, attach
from prunepeft.supernet.layer import UnionLayer
from prunepeft.testing import KindContract
from tests.tiny_models import TINY, tiny_inputs

MODELS = ("bert", "roberta", "gpt2", "llama", "qwen2", "opt", "t5", "vit")
NORM_IS_CONSTANT = {"constants": ("A", "B")}  # see tests/unit/test_kinds_peft.py
CORE = ("bert", "gpt2", "llama", "t5", "vit")
WITH_BIASES = tuple(name for name in MODELS if name not in ("llama", "t5"))
# Kinds that depend on more of a model than its linear layers run on all models.
WIDE = ("lora", "serial_adapter", "parallel_adapter", "prefix", "lnfit")
ROWS = {
    "lora": {},
    "dora": NORM_IS_CONSTANT,
    "ia3": {},
    "serial_adapter": {},
    "parallel_adapter": {},
    "low_rank_adapter": {},
    "ether": {"starts_as_identity": False},
    "ether_plus": {},
    "ssl": {},
    "ssb": {},
    "alore": {},
    "loretta_adp": {},
    "loretta_rep": {},
    "prefix": {"starts_as_identity": False},
    "bitfit": {},
    "lnfit": {},
}
PLACES = dict.fromkeys(WIDE, MODELS) | {"bitfit": WITH_BIASES}
PAIRS = [(kind, model) for kind in ROWS for model in PLACES.get(kind, CORE)]
VARIANTS = (
    ("lora", {"options": {"alpha": 8.0, "rslora": True, "dropout": 0.2}}),
    ("dora", {"options": {"alpha": 8.0, "rslora": True, "dropout": 0.2}} | NORM_IS_CONSTANT),
    ("serial_adapter", {"options": {"activation": "gelu", "dropout": 0.2}}),
    ("serial_adapter", {"options": {"init_weights": "paper"}, "starts_as_identity": False}),
    ("parallel_adapter", {"options": {"activation": "silu", "scale": 4.0}, "atol": 1e-4}),
    ("parallel_adapter", {"options": {"activation": "tanh", "dropout": 0.2}, "size": 5}),
    ("low_rank_adapter", {"options": {"reduction": 4, "dropout": 0.2, "activation": "relu"}}),
    ("ether", {"options": {"blocks": 4, "side": "output"}, "starts_as_identity": False}),
    ("ether", {"options": {"blocks": 2}, "starts_as_identity": False}),
    ("ether_plus", {"options": {"blocks": 4, "sides": "input"}}),
    ("ether_plus", {"options": {"blocks": 2, "sides": "output"}}),
    ("ssb", {"options": {"scale_bias": True}}),
    ("alore", {"options": {"form": "phm", "position": "pre", "scale": 2.0}}),
    ("alore", {"options": {"experts": 2}}),
    ("loretta_adp", {"options": {"bottleneck": 34, "activation": "gelu", "dropout": 0.2}}),
    ("loretta_adp", {"options": {"init_weights": "paper"}, "starts_as_identity": False}),
    ("loretta_rep", {"options": {"rank": 20, "alpha": 8.0, "dropout": 0.2}, "size": 5}),
    ("loretta_rep", {"options": {"init_weights": "paper"}, "starts_as_identity": False}),
    ("prefix", {"options": {"init_std": 0.5}, "size": 5, "starts_as_identity": False}),
)


@cache
def base_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = TINY[name]()
    return model, tiny_inputs(name, model)


def test_every_registered_kind_has_a_row() -> None:
    assert set(ROWS) == set(KINDS.names())


@pytest.mark.parametrize("check", KindContract.checks())
@pytest.mark.parametrize(("kind", "model"), PAIRS)
def test_contract(kind: str, model: str, check: str) -> None:
    KindContract(kind, *base_and_inputs(model), **ROWS[kind]).run(check)


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize(("kind", "row"), VARIANTS)
def test_contract_of_options(kind: str, row: dict, model: str) -> None:
    KindContract(kind, *base_and_inputs(model), **row).run()


def test_contract_finds_a_module_that_is_no_identity() -> None:
    row = {"options": {"init_weights": "paper"}}
    contract = KindContract("serial_adapter", *base_and_inputs("bert"), **row)
    with pytest.raises(AssertionError, match="identity: False"):
        contract.run("identity_at_start")


def test_contract_finds_a_wrong_gradient() -> None:
    contract = KindContract("dora", *base_and_inputs("bert"))  # the detached norm, not declared
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        contract.run("gradient_of_delta")


def test_source_is_shared_by_active_adapters_and_dropped_after_the_pass() -> None:
    model, inputs = base_and_inputs("llama")
    sites = [s for s in find_sites(model) if s.role in ("o", "down")]
    placement = Placement({Slot((s,), "parallel_adapter", (2,)): 2 for s in sites})
    net = attach(copy.deepcopy(model), placement).eval()
    net.add_adapter("other", UnionConfig(placement=placement.to_dict()))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "union_" in name:
                parameter.copy_(torch.randn_like(parameter))
        outputs = []
        for active in (["default"], ["other"], ["default", "other"]):
            net.base_model.set_adapter(active)
            outputs.append(net(**inputs).logits)
        with net.disable_adapter():
            outputs.append(net(**inputs).logits)
    assert all(not torch.allclose(a, b) for a, b in combinations(outputs, 2))
    assert_close(outputs[-1], model(**inputs).logits, rtol=0, atol=0)
    taps = [m.tap for m in net.modules() if isinstance(m, UnionLayer)]
    assert len(taps) == len(sites)
    assert all(tap.value is None for tap in taps)
