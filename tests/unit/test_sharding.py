"""Refusals and estimates of a base model that is cut over processes; see also integration."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prunepeft
from prunepeft import run
from prunepeft.config import load_config
from prunepeft.errors import ConfigError
from prunepeft.estimates import estimate_memory
from prunepeft.plan import make_plan
from prunepeft.processes import is_cut, own_part, whole
from prunepeft.sharding import check_shard, shard_base
from prunepeft.strategies import METHODS
from tests.tiny_models import TINY
from tests.tiny_tokenizer import save_tiny_model


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("given")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": "ab"[i % 2]} for i in range(40)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny_model(place / "bert", "bert", head="base")
    flat = {"model": str(model), "data": str(place / "data.jsonl"), "budget": "1200"}
    return flat | {"device": "cpu", "kinds": "lora"}


def config_of(given: dict[str, Any], **change: Any) -> Any:
    return load_config(None, (), given | {"shard": True} | change)


@pytest.mark.parametrize("job", [run.check, run.search])
def test_one_process_is_refused_and_leaves_nothing(given, tmp_path, job):
    with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node 2.*or leave shard out"):
        job(config_of(given, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_smaller_base_is_refused(given):
    with pytest.raises(ConfigError, match=r"base_ratio=0.5 .* run prune-base first"):
        config_of(given, base_ratio=0.5)


@pytest.mark.parametrize("method", ["light-peft", "gora", "fisher", "adalora"])
def test_methods_that_work_on_the_weights_are_refused(given, monkeypatch, method):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"method {method} works on the weights"):
        make_plan(config_of(given, method=method))


def test_all_other_methods_are_allowed(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = TINY["bert"]().config
    refused = []
    for name, method in METHODS:
        config = SimpleNamespace(shard=True, method=name, arch=None, quantize="none")
        try:
            check_shard(config, model, needs_whole_base=method.needs_whole_base)
        except ConfigError:
            refused.append(name)
    assert sorted(refused) == ["adalora", "fisher", "gora", "light-peft"]
    given_arch = SimpleNamespace(shard=True, method="gora", arch="arch.json", quantize="none")
    check_shard(given_arch, model, needs_whole_base=True)


def test_trials_in_other_processes_are_refused(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="backend=process"):
        make_plan(config_of(given, method="random", backend="process"))


def test_a_quantised_model_is_refused(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TINY["bert"]().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match="this model is quantised"):
        check_shard(config_of(given), config, needs_whole_base=False)


def test_without_a_group_of_processes_nothing_is_cut():
    model = TINY["bert"]()
    with pytest.raises(ConfigError, match="belongs to no group"):
        shard_base(model, ["classifier"], "cpu")
    assert not any(is_cut(p) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_tensor_that_is_not_cut_is_whole():
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    assert own_part(tensor) is tensor


def test_more_processes_hold_less_each(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = make_plan(config_of(given))
    inside = sum(s.d_in * s.d_out for s in plan.sites if s.role != "norm")
    found = []
    for n in (1, 2, 4, 1000):
        monkeypatch.setenv("WORLD_SIZE", str(n))
        found.append(estimate_memory(plan, 0))
    alone = make_plan(load_config(None, (), given))
    assert found == sorted(found, reverse=True)
    assert found[2] < found[1]
    left = plan.n_base - inside + 3 * inside / 2  # two layers
    assert found[3] == pytest.approx(
        estimate_memory(alone, 0) - 4 * (plan.n_base * (1 - 1 / 1000) - left), abs=4
    )


def test_the_library_takes_the_key_too(given, tmp_path: Path):
    settings = {key: value for key, value in given.items() if key not in ("model", "data")}
    with pytest.raises(ConfigError, match="here is one"):
        prunepeft.search(
            given["model"], given["data"], **settings, shard=True, output=str(tmp_path / "run")
        )
