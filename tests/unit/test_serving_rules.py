"""Which engine serves which adapter: the rules of each, as a table."""

import pytest

from prunepeft.report.adapter_file import LoraSettings
from prunepeft.report.grid import Module
from prunepeft.report.serving import lora_verdicts, union_verdicts


def lora_module(path, rank):
    layer = int(path.split(".")[1])
    column = ("self_attn", path.rpartition(".")[2], "lora")
    return Module(path + ":lora", ("model", layer), column, rank, 16 * rank, (path,))


def make_settings(**changes):
    fields = {
        "r": 8,
        "alpha": 16,
        "rank_pattern": {},
        "alpha_pattern": {},
        "is_dora": False,
        "is_rslora": False,
        "has_bias": False,
        "has_head": False,
        "is_regex": False,
    }
    return LoraSettings(**(fields | changes))


QV = ("layers.0.q_proj", "layers.0.v_proj")


@pytest.mark.parametrize(
    ("ranks", "changes", "vllm", "sglang", "llama"),
    [
        ({QV[0]: 8, QV[1]: 8}, {}, "works with flags", "works with flags", "works with flags"),
        ({QV[0]: 4, QV[1]: 8}, {}, "no", "no", "works with flags"),
        ({QV[0]: 4, QV[1]: 8}, {"alpha_pattern": {QV[0]: 8}}, "works with flags", "no", "no"),
        ({QV[0]: 8, QV[1]: 8}, {"has_head": True}, "no", "no", "no"),
        ({QV[0]: 8, QV[1]: 8}, {"is_dora": True}, "no", "no", "no"),
        ({QV[0]: 8, QV[1]: 8}, {"has_bias": True}, "no", "no", "no"),
        ({QV[0]: 8}, {}, "works with flags", "no", "works with flags"),
        ({QV[0]: 8, QV[1]: 8}, {"is_regex": True}, "works with flags", "no", "works with flags"),
        ({QV[0]: 8, QV[1]: 8}, {"is_rslora": True}, "works with flags", "works with flags", "no"),
        ({QV[0]: 8, QV[1]: 8}, {"alpha_pattern": {"(a+)+$": 1}}, "no", "no", "no"),
        ({QV[0]: 600, QV[1]: 600}, {"r": 600}, "no", "works with flags", "works with flags"),
    ],
    ids=[
        "uniform",
        "ranks differ, one alpha",
        "ranks differ, one scale",
        "head",
        "dora",
        "bias",
        "q without v",
        "regex target",
        "rslora",
        "regex pattern",
        "rank too large",
    ],
)
def test_serving_rules(ranks, changes, vllm, sglang, llama):
    modules = [lora_module(path, rank) for path, rank in ranks.items()]
    found = {v["engine"]: v["verdict"] for v in lora_verdicts(modules, make_settings(**changes))}
    assert found == {
        "peft, transformers": "works",
        "vLLM": vllm,
        "SGLang": sglang,
        "llama.cpp": llama,
    }


def test_vllm_flag_is_the_next_rank_it_allows():
    modules = [lora_module(path, 12) for path in QV]
    (vllm,) = [v for v in lora_verdicts(modules, make_settings(r=12)) if v["engine"] == "vLLM"]
    assert vllm["reason"].endswith("--max-lora-rank 16")


@pytest.mark.parametrize(
    ("kinds", "verdict", "reason"),
    [
        ({"lora"}, "after export", "--format serve"),
        ({"lora", "ia3"}, "after merging", "--format merged"),
        ({"lora", "parallel_adapter"}, "no", "parallel_adapter cannot be merged"),
        ({"brand_new"}, "no", "brand_new cannot be merged"),
    ],
)
def test_serving_of_union_adapters(kinds, verdict, reason):
    own, *engines = union_verdicts(kinds, trained=True)
    assert own["verdict"] == "after import"
    assert {entry["verdict"] for entry in engines} == {verdict}
    assert all(reason in entry["reason"] for entry in engines)
