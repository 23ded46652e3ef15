"""kill -9 of a whole search, wherever it strikes: the same command ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.forked_runs import (
    EPOCHS,
    ROOT,
    ROUNDS,
    ForkServer,
    results_of,
    untidy,
)

pytestmark = pytest.mark.slow

KEEP = "search.reinit=keep"
N_RANDOM = 20


def at(call, number=1, match="", when="before"):
    return {"call": call, "number": number, "match": match, "when": when, "do": "kill"}


POINTS = {
    "before the folder is a run": at("os:fsync", match="config.yaml"),
    "after tokenising": at("prunepeft.engine:Engine.encode", 2, when="after"),
    "mid-step in the warm-up": at("transformers:Trainer.training_step", 2),
    "mid-step in a round": at("transformers:Trainer.training_step", 7),
    "mid-step in the last epoch": at("transformers:Trainer.training_step", 11, when="after"),
    "after temp write, before fsync": at("os:fsync", 2, match="/trials/.tmp-"),
    "after fsync, before rename": at("os:replace", 4, match="/trials/.tmp-"),
    "after rename, before the folder is synced": at("os:replace", 4, "/trials/.tmp-", "after"),
    "mid-prune": at("prunepeft.strategies.hybrid_pruning:hybrid_probability", when="after"),
    "weights renamed, entry not written": at("os:replace", 1, ".safetensors", "after"),
    "training state renamed": at("os:replace", 1, "/state/train-", "after"),
    "training kept, its state not cleared": at("prunepeft.training.resumable:Resumable.clear"),
    "mid-evaluation": at("transformers:Trainer.prediction_step", 2),
    "adapter half written": at("peft.peft_model:safe_save_file", when="after"),
    "adapter written, not renamed": at("os:rename", match="adapter"),
    "adapter renamed": at("os:rename", 1, "adapter", "after"),
    "mid-evaluation of the reloaded adapter": at("transformers:Trainer.prediction_step", 3),
    "result renamed, manifest not written": at("os:replace", 1, "result.json", "after"),
    "mid-report": at("os:replace", 2, match="/report/"),
    "before the report's page": at("os:fsync", match=".tmp-report.html"),
}
KEEP_POINTS = (
    "mid-step in a round",
    "mid-prune",
    "weights renamed, entry not written",
    "mid-step in the last epoch",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("kill")) as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(server):
    """Results of runs that nothing happened to, by setting, and the epochs each takes."""
    found = {}
    for settings in ((), (KEEP,)):
        run = server.work / "-".join(["whole", *settings])
        attempt = server.search(run, *settings)
        assert attempt.code == 0, attempt.err
        assert untidy(run) == []
        found[settings] = (results_of(run), attempt.phases, attempt.seconds)
    return found


def check_resumed(server, run, settings, killed, uninterrupted):
    """Run the same command again and compare everything with the run that was never killed."""
    expected, phases, _ = uninterrupted[settings]
    resumed = server.search(run, *settings)
    assert resumed.code == 0, resumed.err
    assert results_of(run) == expected
    assert untidy(run) == []
    assert (run / "report" / "report.html").is_file()
    assert (run / "README.md").is_file()
    assert killed.phases + resumed.phases <= phases + 1
    return resumed


def test_the_uninterrupted_run_means_something(server, uninterrupted):
    run = server.work / "whole"
    result, history = (json.loads((run / f"{n}.json").read_text()) for n in ("result", "history"))
    assert result["metric"]["best_epoch"] == EPOCHS
    assert len(history["rounds"]) == ROUNDS
    assert all(entry["removed"] for entry in history["rounds"])
    assert history["warmup"]["runs"] > 1
    assert uninterrupted[()][1] == history["warmup"]["runs"] + ROUNDS + EPOCHS
    assert uninterrupted[()][0] != uninterrupted[(KEEP,)][0]


def test_a_fresh_process_gives_the_same_bytes(server, uninterrupted, tmp_path):
    """The plain command, with another order of sets, so that forked children prove something."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "12345"}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prunepeft", *server.arguments(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "run") == uninterrupted[()][0]


@pytest.mark.parametrize(
    ("point", "settings"),
    [(point, ()) for point in POINTS] + [(point, (KEEP,)) for point in KEEP_POINTS],
)
def test_killed_at_a_named_point(server, uninterrupted, tmp_path, point, settings):
    killed = server.search(tmp_path / "run", *settings, faults=(POINTS[point],))
    assert killed.code == -signal.SIGKILL, f"the point was never reached: {killed.err}"
    check_resumed(server, tmp_path / "run", settings, killed, uninterrupted)


@pytest.mark.parametrize("number", range(N_RANDOM))
def test_killed_at_a_random_time(server, uninterrupted, tmp_path, number):
    """One time in each twentieth of the run; every fifth run keeps its weights between rounds."""
    settings = (KEEP,) if number % 5 == 2 else ()
    share = (number + random.Random(number).random()) / N_RANDOM
    seconds, run = share * uninterrupted[settings][2], tmp_path / "run"
    killed = server.search(run, *settings, strike=(seconds, signal.SIGKILL))
    while killed.code == 0:  # it was faster than the run that was measured
        seconds, run = seconds / 2, run.with_name(f"{run.name}-again")
        killed = server.search(run, *settings, strike=(seconds, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL, killed.err
    check_resumed(server, run, settings, killed, uninterrupted)


def test_killed_again_and_again(server, uninterrupted, tmp_path):
    """Every life gets one epoch further, so a run ends however often it is killed."""
    expected, phases, _ = uninterrupted[()]
    for life in range(phases):
        fault = at("prunepeft.training.phases:Phases._run", 2)
        killed = server.search(tmp_path / "run", faults=(fault,))
        if killed.code == 0:
            break
        assert killed.code == -signal.SIGKILL, killed.err
        assert killed.phases == 1, f"life {life} got no further"
    assert killed.code == 0
    assert results_of(tmp_path / "run") == expected


def test_a_finished_run_returns_at_once(server, uninterrupted):
    run: Path = server.work / "whole"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    again = server.search(run)
    assert (again.code, again.phases) == (0, 0)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
