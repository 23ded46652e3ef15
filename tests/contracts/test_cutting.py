"""A cut of the base model changes no output, with modules of every kind on it."""

from functools import cache

import pytest
from torch import Tensor, nn

from prunepeft.kinds import KINDS
from prunepeft.sites import find_sites
from prunepeft.testing import CutContract
from tests.tiny_models import TINY, tiny_inputs

MODELS = ("bert", "llama", "gpt2", "t5", "vit")
QUICK = ("masked_is_cut", "layer_without_neurons", "saved_and_loaded")
# kind -> options that change which side of the layer it mixes, or how it starts
VARIANTS = (
    ("ether", {"side": "output", "blocks": 2}),
    ("ether", {"blocks": 4}),
    ("ether_plus", {"sides": "input"}),
    ("ether_plus", {"sides": "output", "blocks": 2}),
    ("alore", {"position": "pre"}),
    ("alore", {"form": "phm", "experts": 2}),
    ("ssb", {"scale_bias": True}),
    ("loretta_rep", {"init_weights": "paper"}),
    ("dora", {"rslora": True, "alpha": 8.0}),
)


@cache
def base_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = TINY[name]()
    return model, tiny_inputs(name, model)


def fits(kind: str, model: str) -> bool:
    made = KINDS.get(kind)()
    return any(made.fits(site) for site in find_sites(base_and_inputs(model)[0]))


PAIRS = [(k, m) for k in KINDS.names() for m in MODELS if fits(k, m)]


@pytest.mark.parametrize(("kind", "model"), PAIRS)
def test_contract(kind: str, model: str) -> None:
    checks = () if model in ("bert", "gpt2") else QUICK
    CutContract((kind,), *base_and_inputs(model)).run(*checks)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_contract_of_options(kind: str, options: dict) -> None:
    CutContract((kind,), *base_and_inputs("bert"), options={kind: options}).run()


@pytest.mark.parametrize("model", MODELS)
def test_contract_of_all_kinds_at_once(model: str) -> None:
    kinds = tuple(kind for kind in KINDS.names() if fits(kind, model))
    CutContract(kinds, *base_and_inputs(model)).run()


@pytest.mark.parametrize("roles", [(("q", "v"), ("up",)), (("o",), ("down",)), (("k",), ("up",))])
def test_kinds_that_are_folded_keep_the_function_at_other_roles(roles: tuple) -> None:
    kinds = ("ether", "ether_plus", "alore", "loretta_rep", "dora", "lora", "ia3", "ssb")
    contract = CutContract(kinds, *base_and_inputs("bert"), roles=dict.fromkeys(kinds, roles))
    contract.run(*QUICK)
