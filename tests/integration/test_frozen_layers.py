"""Runs whose modules sit in the upper layers alone: the same result with and without reuse."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import prunepeft
from prunepeft import find_sites, make_space
from prunepeft.prefix.reuse import PrefixReuse
from prunepeft.result import Result
from tests.tiny_models import make_tiny
from tests.tiny_tokenizer import tiny_tokenizer

WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
WIDE |= {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder wide enough to show the rounding of bfloat16, texts of any length, a placement."""
    folder = tmp_path_factory.mktemp("frozen")
    make_tiny("llama", None, **WIDE).save_pretrained(folder / "llama")
    tiny_tokenizer("causal").save_pretrained(folder / "llama")
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(f"w{draw.randrange(20)}" for _ in range(draw.randrange(2, 6))),
            "completion": " ".join(f"w{(i + j) % 9}" for j in range(draw.randrange(3, 80))),
        }
        for i in range(240)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    full = make_space(find_sites(model), ("lora",), sizes={"lora": 4}).full()
    upper = full.without([slot.id for slot in full if slot.layer < 3])
    (folder / "arch.json").write_text(json.dumps(upper.to_dict()))
    return folder


def train(place: Path, name: str, precision: str, gb: float) -> Result:
    return prunepeft.search(
        str(place / "llama"),
        str(place / "rows.jsonl"),
        budget="50k",
        arch=str(place / "arch.json"),
        train={"epochs": 1, "lr": 5e-3, "batch_size": 16, "prefix_cache_gb": gb},
        precision=precision,
        device="cpu",
        output=str(place / name),
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_run_is_the_same_with_frozen_layers_run_once(place, precision, tolerance, monkeypatch):
    whole = train(place, f"{precision}-whole", precision, 0.0)
    used = []
    of = PrefixReuse.of
    monkeypatch.setattr(PrefixReuse, "of", lambda *a: used.append(of(*a)) or used[-1])
    kept = train(place, f"{precision}-kept", precision, 1.0)
    assert any(states is not None for states in used)
    assert kept.metric == pytest.approx(whole.metric, rel=tolerance)
    measured = kept.report["metric"]  # in the training, and of the adapter loaded from the disk
    assert measured["reloaded"] == measured["value"]
    assert not list((place / f"{precision}-kept").rglob(".tmp-mapped*"))
