"""With a part of the base model on each process all comes out as with the whole on one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from prunepeft import run
from prunepeft.config import load_config
from prunepeft.space import Placement
from tests.integration.parallel_driver import EVEN, UNEVEN, one_epoch
from tests.integration.test_parallel import read, two_processes
from tests.tiny_tokenizer import save_tiny_model

DRIVER = Path(__file__).with_name("shard_driver.py")
SETTINGS = {
    "budget": "1200",
    "kinds": "lora,serial_adapter,dora",
    "device": "cpu",
    "train.epochs": 2,
    "train.lr": 5e-3,
    "train.batch_size": 8,
}
ROUNDS = {"search.rounds": 2, "search.warmup": False, "search.reinit": "keep"}
# What is searched, on which model; each says one more thing about passes over the base model.
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "bert",
        ROUNDS | {"search.warmup": True, "search.warmup_rows": 16, "search.warmup_epochs": 1},
    ),
    "llama": (
        "llama",
        ROUNDS | {"train.gradient_checkpointing": True, "train.gradient_accumulation": 2},
    ),
    "kappatune": ("llama", {"method": "kappatune", "kinds": "lora"}),
    "lora_drop": ("bert", {"method": "lora_drop", "kinds": "lora", "ist": True, "ist.every": 2}),
    "cache": ("llama", {"method": "random", "black_box.n_trials": 2, "train.epochs": 1}),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Model and data of each family."""
    place = tmp_path_factory.mktemp("world")
    texts = [
        " ".join(f"w{(i * 7 + j * (1 + i % 3)) % 50}" for j in range(2 + i % 5)) for i in range(48)
    ]
    rows = {
        "bert": [{"text": text, "label": "ab"[i % 3 == 0]} for i, text in enumerate(texts)],
        "llama": [{"prompt": t, "completion": f"w1 w{i % 40}"} for i, t in enumerate(texts)],
    }
    found = {}
    for family, lines in rows.items():
        data = place / f"{family}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        head = "base" if family == "bert" else None
        model = save_tiny_model(place / family, family, head=head)
        found[family] = {"model": str(model), "data": str(data)}
    return found


def processes(job: str, folder: Path, timeout: float = 200) -> None:
    done = two_processes(str(DRIVER), job, str(folder), timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def settings_of(world: dict[str, dict[str, str]], name: str, output: Path) -> dict[str, Any]:
    family, change = SEARCHES[name]
    return SETTINGS | world[family] | change | {"output": str(output)}


def test_every_family_attaches_learns_prunes_and_detaches(tmp_path):
    processes("FAMILIES", tmp_path)


def test_steps_are_those_of_one_process_and_of_data_parallel(world, tmp_path):
    cases = {
        f"{family} {shard} {name}": world[family] | {"settings": settings | {"shard": shard}}
        for family in world
        for shard in (False, True)
        for name, settings in (("even", EVEN), ("uneven", UNEVEN))
    }
    (tmp_path / "epochs.json").write_text(json.dumps(cases))
    given = SETTINGS | world["llama"] | {"output": str(tmp_path / "run"), "train.batch_size": 6}
    (tmp_path / "frozen.json").write_text(json.dumps(given | {"shard": True}))
    processes("EPOCHS", tmp_path)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for family in world:
        for name, settings in (("even", EVEN), ("uneven", UNEVEN)):
            one = one_epoch(world[family]["model"], world[family]["data"], tmp_path, settings)
            for rank in (0, 1):
                parallel, parts = (found[rank][f"{family} {s} {name}"] for s in (False, True))
                for other, atol in ((parallel, 1e-7), (one, 1e-6)):
                    assert_close(parts["weights"], other["weights"], rtol=0, atol=atol)
                    for means in ("abs_grad_mean", "output_abs_mean"):
                        assert_close(parts[means], other[means], rtol=1e-4, atol=1e-8)
                    assert parts["loss"] == pytest.approx(other["loss"], abs=1e-6)
                    assert parts["steps"] == other["steps"]
                    for metric, value in other["metrics"].items():
                        assert parts["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=5e-3)


def test_searches_find_and_train_the_same(world, tmp_path):
    settings = {name: settings_of(world, name, tmp_path / "one" / name) for name in SEARCHES}
    settings["cache"]["cache"] = str(tmp_path / "one-cache")
    for given in settings.values():
        run.search(load_config(None, (), given))
    parts = [json.loads(json.dumps(s).replace("/one", "/parts")) for s in settings.values()]
    parts.append(half_done(settings["bert"], tmp_path / "parts" / "half"))
    (tmp_path / "settings.json").write_text(json.dumps([p | {"shard": True} for p in parts]))
    processes("SEARCH", tmp_path, timeout=300)
    for name in SEARCHES:
        one, found = same_adapters(tmp_path, name, name)
        metric = read(found / "result.json")["metric"]
        assert metric["reloaded"] == metric["value"], name
        assert metric["value"] == pytest.approx(read(one / "result.json")["metric"]["value"])
    again = run.evaluate(tmp_path / "parts" / "llama")["metrics"]["perplexity"]  # on one process
    assert again == pytest.approx(read(tmp_path / "one/llama/result.json")["metric"]["value"])
    # Trials are named by the content of the base model, all of it.
    kept = [sorted(p.name for p in (tmp_path / c).iterdir()) for c in ("parts-cache", "one-cache")]
    assert kept[0]
    assert kept[0] == kept[1]
    one, half = same_adapters(tmp_path, "bert", "half", atol=0)
    events = [(folder / "metrics.jsonl").read_text() for folder in (one, half)]
    assert [text.count('"kind": "epoch"') for text in events] == [2, 2]  # none was trained again


def half_done(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run that was killed when all was trained and nothing written."""
    shutil.copytree(settings["output"], folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "best")
    return settings | {"output": str(folder)}


def same_adapters(place: Path, one: str, parts: str, atol: float = 2e-5) -> tuple[Path, Path]:
    """The folders of two runs that ended with the same placement and the same tensors.

    AdamW enlarges the rounding of entries whose gradient is nearly zero.
    """
    pair = place / "one" / one, place / "parts" / parts
    for file in ("arch.json", "strategy.json", "adapter/adapter_config.json"):
        wanted, found = ((folder / "best" / file).read_bytes() for folder in pair)
        assert found == wanted, (parts, file)
    wanted, found = (load_file(f / "best" / "adapter" / "adapter_model.safetensors") for f in pair)
    assert_close(found, wanted, rtol=0, atol=atol, msg=lambda text: f"{parts}: {text}")
    return pair


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_holds_its_part(world, tmp_path):
    given = settings_of(world, "llama", tmp_path / "run") | {"device": "cuda", "shard": True}
    (tmp_path / "settings.json").write_text(json.dumps([given]))
    done = two_processes(str(DRIVER), "GPU", str(tmp_path), timeout=300, gpus=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metric = read(tmp_path / "run" / "result.json")["metric"]
    assert metric["reloaded"] == metric["value"]
    assert Placement.from_dict(read(tmp_path / "run" / "best" / "arch.json")).ids
