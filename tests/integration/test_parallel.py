"""Data parallel on two processes gives what one process gives, and ends when one process fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from prunepeft import run
from prunepeft.config import load_config
from tests.integration.parallel_driver import ist_results, results
from tests.tiny_tokenizer import save_tiny_model

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("parallel_driver.py")
SETTINGS = {
    "budget": "1200",
    "kinds": "lora,serial_adapter",
    "device": "cpu",
    "train.epochs": 1,
    "train.lr": 5e-3,
    "train.batch_size": 8,
}
ROUNDS = {
    "search.rounds": 2,
    "search.warmup_turns": 1,
    "search.warmup_rows": 8,
    "search.warmup_epochs": 1,
    "search.reinit": "keep",
}
OWN = {"smam": {"smam.rounds": 2, "search.epochs": 2}, "eva": {}}
WATCHERS = {  # method -> what it scores modules by
    "smam": "first_order",
    "s3delta": "gate",
    "bipeft": "sensitivity",
    "gora": "gora",
    "eva": "eva",
    "adalora": "adalora",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert", head="base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {
            "text": " ".join(f"w{(i * 7 + j * (1 + i % 3)) % 50}" for j in range(2 + i % 5)),
            "label": "ab"[i % 3 == 0],
        }
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def two_processes(
    *command: str, timeout: float = 120, gpus: bool = False
) -> subprocess.CompletedProcess:
    """Run a program under torchrun; it must end within the time."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node", "2", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_processes_take_the_steps_of_one(model, data, tmp_path):
    done = two_processes(str(DRIVER), model, data, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = results(model, data, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found.pop("error") == f"raised by 0 caught by {rank}"
        for name, one in expected.items():
            two = found[name]
            assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)
            # An evaluation lies between: the processes stay together.
            assert_close(two["later_weights"], one["later_weights"], rtol=0, atol=1e-6)
            assert_close(two["abs_grad_mean"], one["abs_grad_mean"], rtol=1e-4, atol=1e-9)
            assert_close(two["output_abs_mean"], one["output_abs_mean"], rtol=1e-4, atol=1e-9)
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
            assert two["steps"] == one["steps"]
            assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]


def test_the_command_finds_the_same_placement(model, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SETTINGS | ROUNDS
    run.search(load_config(None, (), settings | _io(model, data, one)))
    flags = [f"{key}={value}" for key, value in (settings | _io(model, data, two)).items()]
    done = two_processes("-m", "prunepeft", "search", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (two / "best/arch.json").read_bytes() == (one / "best/arch.json").read_bytes()
    assert read(two / "best/strategy.json") == read(one / "best/strategy.json")
    histories = [read(folder / "history.json") for folder in (one, two)]
    for first, second in zip(histories[0]["rounds"], histories[1]["rounds"], strict=True):
        assert second["removed"] == first["removed"]
        assert second["saliency"]["snip"] == pytest.approx(first["saliency"]["snip"], rel=1e-3)
    reports = [read(folder / "result.json") for folder in (one, two)]
    assert reports[1]["metric"]["reloaded"] == reports[1]["metric"]["value"]
    assert reports[1]["train"]["steps"] == reports[0]["train"]["steps"]
    events = [json.loads(line)["kind"] for line in (two / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "done"]  # only the main process writes
    assert done.stdout.count("this run (prunepeft)") == 1
    assert not (two / ".lock").exists()


def test_watchers_see_whole_steps_and_parameters_of_all_processes(model, data, tmp_path):
    settings = [
        SETTINGS
        | _io(model, data, tmp_path / method)
        | {"method": method, **OWN.get(method, {"search.epochs": 2})}
        for method in WATCHERS
    ]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    done = two_processes(str(DRIVER), model, data, str(tmp_path), "SEARCH", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for (method, score), flat in zip(WATCHERS.items(), settings, strict=True):
        one, two = tmp_path / "one" / method, tmp_path / method
        run.search(load_config(None, (), flat | {"output": str(one)}))
        assert (two / "best/arch.json").read_bytes() == (one / "best/arch.json").read_bytes()
        histories = [read(folder / "history.json") for folder in (one, two)]
        for first, second in zip(histories[0]["rounds"], histories[1]["rounds"], strict=True):
            expected = pytest.approx(first["saliency"][score], rel=1e-3)
            assert second["saliency"][score] == expected, method


def test_ist_chooses_and_learns_as_one_process_does(model, data, tmp_path):
    done = two_processes(str(DRIVER), model, data, str(tmp_path), "IST", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = ist_results(model, data, tmp_path / "one")
    for found in (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)):
        for name in ("weights", "own"):
            assert_close(found[name], expected[name], rtol=0, atol=2e-5)
        for name in ("importance", "own_importance"):
            # scores of a high rate tell apart losses that differ by rounding
            assert found[name] == pytest.approx(expected[name], rel=0.1, abs=0.02)
            assert any(found[name].values())


def test_a_process_that_fails_ends_the_job(model, data, tmp_path):
    began = time.monotonic()
    done = two_processes(str(DRIVER), model, data, str(tmp_path), "FAIL", timeout=100)
    assert done.returncode != 0
    assert "one process broke down" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    assert time.monotonic() - began < 60


def _io(model: str, data: str, output: Path) -> dict[str, str]:
    return {"model": model, "data": data, "output": str(output)}
