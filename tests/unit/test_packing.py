"""Packed rows: none sees another, and a step is the same step."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import prunepeft
from prunepeft import attach, find_sites, make_space
from prunepeft.errors import ConfigError
from prunepeft.supernet import trainable_state
from prunepeft.tasks import Collator
from prunepeft.tasks.base import IGNORED
from prunepeft.tasks.packing import PackingCollator, check_packing, first_fit
from prunepeft.training import make_optimizer, make_scheduler
from tests.tiny_models import MORE, TINY, VOCAB
from tests.tiny_tokenizer import save_tiny_model
from tests.unit.test_training import make_phases, make_rows

DECODERS = {
    **{n: TINY[n] for n in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2")},
    **{n: MORE[n] for n in ("phi", "phi3", "gpt_neox", "starcoder2", "olmo2", "granite")},
}


def rows_of(lengths: list[int]) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for n in lengths:
        ids = torch.randint(5, VOCAB, (n,), generator=draw).tolist()
        hidden = n // 3  # a prompt
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * n,
                "labels": [IGNORED] * hidden + ids[hidden:],
                "length": n,
            }
        )
    return rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 30))
def test_packs_hold_every_row_once_and_are_not_too_long(lengths, width) -> None:
    packs = first_fit(lengths, width)
    assert sorted(place for pack in packs for place in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[p] for p in pack) <= width
    if len(packs) > 1 and max(lengths) <= width:  # no two packs would fit into one
        fills = sorted(sum(lengths[p] for p in pack) for pack in packs)
        assert fills[0] + fills[1] > width


def test_a_pack_by_hand() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [IGNORED, 9]},
        {"input_ids": [10, 11, 12], "labels": [10, 11, 12]},
    ]
    batch = PackingCollator(0, 6)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 10, 11, 12], [8, 9, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, 6, 7, i, 11, 12], [i, 9, i, i, i, i]]


@pytest.mark.parametrize("name", list(DECODERS))
def test_loss_and_gradients_are_those_of_padded_rows(name: str) -> None:
    model = DECODERS[name](use_cache=False)
    net = attach(model, make_space(find_sites(model), ("lora",), sizes={"lora": 2}).full()).eval()
    rows = rows_of([9, 4, 7, 3, 12, 5])
    found: list[tuple[float, dict[str, Tensor]]] = []
    for collator in (Collator(0), PackingCollator(0, 16)):
        net.zero_grad()
        loss = net(**collator(rows)).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}
        found.append((loss.item(), grads))
    assert len(PackingCollator(0, 16)(rows)["input_ids"]) == 3
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_close(found[1][1], found[0][1], rtol=0, atol=1e-5)
    assert max(g.abs().max() for g in found[0][1].values()) > 1e-4


@pytest.mark.parametrize("name", ["opt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_rows_leak_are_refused(name: str, dtype: torch.dtype) -> None:
    # OPT masks nothing between the rows of a pack, and Bloom knows no positions.
    model = {**TINY, **MORE}[name](use_cache=False).to(dtype)
    with pytest.raises(ConfigError, match=r"does not keep packed rows apart.*train\.packing=false"):
        check_packing(model, Collator(0), PackingCollator(0, 32), rows_of([9, 4, 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_rows_apart_are_not_refused(dtype: torch.dtype) -> None:
    for name in ("llama", "gpt2", "gemma2"):
        model = DECODERS[name](use_cache=False).to(dtype)
        check_packing(model, Collator(0), PackingCollator(0, 32), rows_of([9, 4, 7]))
        check_packing(model, Collator(0), PackingCollator(0, 9), rows_of([9]))


def test_a_model_whose_rows_leak_is_refused_though_its_first_rows_fill_a_pack(
    tmp_path: Path,
) -> None:
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 100 + ["w1 w2", "w5 w7 w3"] * 5
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": "w1 w2"} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(save_tiny_model(tmp_path / "opt", "opt"))
    train = {"packing": True, "max_length": 16, "epochs": 1}
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        prunepeft.search(model, str(data), budget="300", train=train, output=str(tmp_path / "run"))


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_phase_with_packed_rows_is_the_same_phase(pieces: int) -> None:
    rows = make_rows("llama", n=32, length=None)
    states, losses = [], []
    for packer in (None, PackingCollator(0, 24)):
        model = TINY["llama"](use_cache=False)
        net = attach(model, make_space(find_sites(model), ("lora",), sizes={"lora": 2}).full())
        phases = make_phases(rows, gradient_accumulation=pieces)
        phases.packer = packer
        optimizer = make_optimizer(net, phases.settings, 1e-2)
        scheduler = make_scheduler(optimizer, phases.settings, 4)
        losses.append(phases.run(net, rows, optimizer, scheduler, 0).loss)
        losses.append(phases.evaluate(net)["loss"])
        states.append(trainable_state(net))
    assert losses[2:] == pytest.approx(losses[:2], abs=1e-4)
    assert_close(states[1], states[0], rtol=0, atol=2e-3)  # Adam divides by tiny numbers


def test_packing_goes_through_a_search(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{i % 7} w{i % 3}", "completion": " ".join(f"w{j}" for j in range(1 + i % 9))}
        for i in range(60)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(save_tiny_model(tmp_path / "llama", "llama"))
    settings = {"kinds": ["lora"], "search": {"rounds": 1, "warmup": False}, "device": "cpu"}
    metrics = {}
    for packing in (False, True):
        train = {"epochs": 1, "batch_size": 8, "packing": packing, "max_length": 24}
        output = str(tmp_path / f"run-{packing}")
        result = prunepeft.search(
            model, str(data), budget="300", train=train, output=output, **settings
        )
        metrics[packing] = result.metric
        kept = set(result.placement.ids)
    assert kept
    assert metrics[True] == pytest.approx(metrics[False], rel=1e-3)


def test_packing_is_for_language_models(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"w{i} w{i % 3}", "label": i % 2}) for i in range(40)]
    data.write_text("\n".join(lines))
    model = str(save_tiny_model(tmp_path / "bert", "bert", head="base"))
    train, output = {"packing": True}, str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"packs rows of a causal language model.*seq-cls"):
        prunepeft.search(model, str(data), budget="900", train=train, output=output, device="cpu")
