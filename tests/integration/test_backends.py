"""Real searches with workers: the same placements and metrics as in one process, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prunepeft import run
from prunepeft.backends.processes import Processes
from prunepeft.config import load_config
from prunepeft.errors import ConfigError, DataError
from prunepeft.plan import make_plan
from prunepeft.training.phase_trainer import PhaseCallback
from tests.integration.deadly_replica import deadly
from tests.tiny_tokenizer import save_tiny_model

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "budget": "1200",
    "method": "asha",
    "sizes.lora": "1,2,4",
    "sizes.serial_adapter": "2,4",
    "train.epochs": 1,
    "train.lr": 5e-3,
    "train.batch_size": 8,
    "black_box.n_trials": 4,
    "black_box.eta": 2,
    "black_box.fidelity": 0.5,
    "device": "cpu",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("task")
    rows = [{"text": f"w{i % 11} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]} for i in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny_model(folder / "bert", "bert", head="base")
    return {"model": str(model), "data": str(folder / "train.jsonl")}


def search(task: dict, output: Path, **settings: Any) -> dict[str, Any]:
    config = load_config(None, (), SETTINGS | task | {"output": str(output)} | settings)
    return run.search(config)


def evidence(folder: Path) -> dict[str, Any]:
    """What must not depend on where the trials ran."""
    history = json.loads((folder / "history.json").read_text())
    for trial in history["trials"]:
        trial.pop("seconds")
    result = json.loads((folder / "result.json").read_text())
    return {
        "history": history,
        "placement": (folder / "best" / "arch.json").read_text(),
        "metric": result["metric"],
        "steps": result["search"]["steps"],
        "keys": sorted(f.name for f in (folder / "trials").glob("*.json")),
        "adapter": (folder / "best/adapter/adapter_model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def serial(task, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("serial") / "run"
    search(task, folder)
    return evidence(folder)


@pytest.fixture
def death(monkeypatch, tmp_path) -> Path:
    """The first worker that takes its second step is killed in it; the file says which."""
    monkeypatch.setattr(run, "make_replica", deadly(tmp_path / "killed"))
    return tmp_path / "killed"


# --- the same results ----------------------------------------------------------------------------


def test_processes_find_what_one_finds_though_a_worker_is_killed(task, serial, tmp_path, death):
    search(task, tmp_path / "run", backend="process")
    assert int(death.read_text()) != os.getpid()
    assert evidence(tmp_path / "run") == serial
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert log.count("a worker died over trial") == 1
    assert (tmp_path / "run" / "logs" / "workers.log").is_file()


@pytest.mark.usefixtures("ray_cluster")
def test_ray_finds_what_one_finds_though_a_worker_is_killed(task, serial, tmp_path, death):
    search(task, tmp_path / "run", backend="ray")
    assert int(death.read_text()) != os.getpid()
    assert evidence(tmp_path / "run") == serial


def test_a_cluster_of_its_own_is_quiet_and_ends_with_the_search(task, serial, tmp_path):
    pytest.importorskip("ray")
    script = (
        "import signal, sys, ray; from prunepeft import cli\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as left: assert not left.code\n"
        "assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) == before"
    )
    flags = [f"{k}={v}" for k, v in (SETTINGS | task | {"output": str(tmp_path / "run")}).items()]
    command = [sys.executable, "-c", script, "search", "--json", "--backend", "ray", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["placement"]
    assert "raylet" not in done.stderr
    assert evidence(tmp_path / "run") == serial


def test_evolution_and_a_base_that_was_cut(task, tmp_path):
    """Workers cut their base by the scores in the journal."""
    more = {"method": "evolution", "black_box.population": 2, "black_box.n_trials": 3}
    more |= {"base_ratio": 0.5, "black_box.eta": 3, "base.epochs": 1, "base.method": "magnitude"}
    search(task, tmp_path / "serial", **more)
    search(task, tmp_path / "process", **more, backend="process")
    assert evidence(tmp_path / "process") == evidence(tmp_path / "serial")


# --- killed main process -------------------------------------------------------------------------


def test_kill_the_main_process_and_resume_on_another_backend(task, serial, tmp_path, ray_cluster):
    """The run starts on Ray, by its address, and goes on in one process."""
    output = tmp_path / "run"
    settings = SETTINGS | task | {"output": str(output), "ray_address": ray_cluster}
    flags = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "prunepeft", "search", "--backend", "ray", *flags]
    killed = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while not list((output / "trials").glob("*.json")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {f: f.stat().st_mtime_ns for f in (output / "trials").glob("*.json")}
    assert kept
    search(task, output)
    assert evidence(output) == serial
    assert all(f.stat().st_mtime_ns == when for f, when in kept.items())


def test_workers_end_with_the_main_process(task, tmp_path):
    output = tmp_path / "run"
    settings = SETTINGS | task | {"output": str(output), "backend": "process", "workers": "1"}
    settings |= {"black_box.n_trials": 50, "black_box.fidelity": 1.0, "method": "random"}
    settings.pop("black_box.eta")
    flags = [f"{key}={value}" for key, value in settings.items()]
    main = subprocess.Popen(
        [sys.executable, "-m", "prunepeft", "search", *flags], env=environment()
    )
    deadline = time.monotonic() + 900
    while not list((output / "trials").glob("*.json")) and time.monotonic() < deadline:
        assert main.poll() is None
        time.sleep(0.02)
    workers = children(main.pid)
    main.send_signal(signal.SIGKILL)
    main.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in tasks for child in file.read_text().split()]


# --- errors --------------------------------------------------------------------------------------


def test_data_that_changed_is_one_typed_error(task, tmp_path, monkeypatch):
    """The main process has read good data; the worker finds none."""
    real = Processes.hire

    def hire(self, number):
        (tmp_path / "train.jsonl").write_text("no json\n")
        return real(self, number)

    (tmp_path / "train.jsonl").write_text(Path(task["data"]).read_text())
    monkeypatch.setattr(Processes, "hire", hire)
    changed = task | {"data": str(tmp_path / "train.jsonl")}
    with pytest.raises(DataError, match=r"train\.jsonl"):
        search(changed, tmp_path / "run", backend="process", workers=1)
    assert list((tmp_path / "run" / "trials").iterdir()) == []


def test_methods_without_trials_are_refused_before_anything(task, tmp_path):
    settings = {"budget": "5 modules", "method": "smam", "backend": "process"}
    with pytest.raises(ConfigError, match="method smam has no independent trials"):
        make_plan(load_config(None, (), task | settings))
    assert not (tmp_path / "run").exists()


# --- the cache -----------------------------------------------------------------------------------


def test_runs_share_trials(task, serial, tmp_path, monkeypatch):
    steps = []
    real = PhaseCallback.on_step_end

    def counting(self, *args, **kwargs):
        steps.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PhaseCallback, "on_step_end", counting)
    shared = {"cache": str(tmp_path / "cache")}
    first = search(task, tmp_path / "a", **shared)
    trained = len(steps) - first["train"]["steps"]
    assert trained == first["search"]["steps"] > 0
    steps.clear()
    second = search(task, tmp_path / "b", **shared)
    assert len(steps) == second["train"]["steps"]  # no trial was trained
    took = [dict(run["search"]) for run in (first, second)]
    seconds = [search.pop("seconds") for search in took]
    assert took[0] == took[1]  # and all were counted, with the time to propose them as it was
    assert seconds[1] == pytest.approx(seconds[0], abs=0.5)
    assert evidence(tmp_path / "b") == evidence(tmp_path / "a") == serial
    steps.clear()
    search(task, tmp_path / "c", **shared, **{"search.lr": 1e-3})
    assert len(steps) == trained + first["train"]["steps"]  # other settings, other trials
    for file in (tmp_path / "cache").glob("*.json"):
        file.write_text("{")
    steps.clear()
    search(task, tmp_path / "d", **shared)
    assert len(steps) == trained + first["train"]["steps"]  # damaged entries count as absent
