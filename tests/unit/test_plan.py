"""Choices of a plan that need no model."""

from types import SimpleNamespace

import pytest

from prunepeft.config import load_config
from prunepeft.errors import ConfigError
from prunepeft.plan import Plan, _cpu_has_bf16, _space
from prunepeft.space import Site
from prunepeft.strategies.make import make_strategy

SITES = tuple(
    Site(f"l.{layer}.{role}", "encoder", layer, 2, block, role, 8, 8, source)
    for layer in range(2)
    for block, role, source in (
        ("attention", "q", ""),
        ("attention", "v", ""),
        ("ffn", "down", f"l.{layer}.up"),
    )
)


def config(*overrides: str):
    flags = {"model": "m", "data": "d", "budget": "1%", "space": "paper"}
    return load_config(None, overrides, flags)


def test_paper_space_holds_the_kinds_asked_for():
    both = _space(config(), SITES, None, 0)
    assert sorted({s.kind for s in both}) == ["lora", "serial_adapter"]
    lora = _space(config("kinds=lora"), SITES, None, 0)
    assert [(s.kind, s.sizes) for s in lora] == [("lora", (32,))] * 2


@pytest.mark.parametrize("wrong", ["sizes.lora=4", "options.lora.dropout=0.2", "kinds=ia3"])
def test_paper_space_refuses_what_it_would_ignore(wrong):
    with pytest.raises(ConfigError, match="space=paper holds lora and serial_adapter"):
        _space(config(wrong), SITES, None, 0)


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("random", "black_box.eta=5"),
        ("asha", "black_box.population=7"),
        ("random", "search.epochs=2"),
        ("smam", "search.rounds=10"),
        ("bipeft", "smam.rounds=7"),
        ("prunepeft", "black_box.n_trials=3"),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(method: str, setting: str) -> None:
    flags = {"model": "m", "data": "d", "budget": "1%", "method": method}
    name = setting.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=f"does not read {name}"):
        make_strategy(load_config(None, (setting,), flags))


# --- number format -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "n_base", "native", "cuts", "expected"),
    [
        ("fp32", 10**9, True, False, False),
        ("bf16", 100, False, True, True),
        ("auto", 10**9, True, False, True),
        ("auto", 10**9, False, False, False),
        ("auto", 9_999_999, True, False, False),
        ("auto", 10**9, True, True, False),
    ],
)
def test_bf16_is_taken_where_a_processor_is_fast_in_it(
    monkeypatch, precision, n_base, native, cuts, expected
):
    monkeypatch.setattr("prunepeft.plan._cpu_has_bf16", lambda: native)
    config = SimpleNamespace(precision=precision)
    plan = SimpleNamespace(config=config, n_base=n_base, groups=("heads",) if cuts else ())
    assert Plan.uses_bf16(plan, "cpu") is expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True)],
)
def test_what_the_processor_says(monkeypatch, found, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found, raising=False)
    assert _cpu_has_bf16() is expected
    monkeypatch.delattr("torch.cpu.get_capabilities")
    assert _cpu_has_bf16() is False
