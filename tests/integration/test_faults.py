"""A whole search under faults: each ends with its own exit code, and the same command goes on."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from prunepeft.state import Journal, read_tensors
from tests.disk_faults import leftovers
from tests.integration.forked_runs import ForkServer, count, make_inputs, results_of, untidy

pytestmark = pytest.mark.slow

STEP = "transformers:Trainer.training_step"
KEEP = "search.reinit=keep"
IN_THE_WARM_UP, IN_A_ROUND, IN_THE_TRAINING = 2, 6, 10
N_FULL_DISKS = 12


def at(call, number, do, match="", when="before", until=None):
    fault = {"call": call, "number": number, "match": match, "when": when, "do": do}
    return fault | ({} if until is None else {"until": until})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server):
    """A run that nothing happened to: its folder and how it went."""
    run = server.work / "whole"
    attempt = server.search(run, faults=(count("os:write"),))
    assert attempt.code == 0, attempt.err
    return run, attempt


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def still(server):
    """Inputs without dropout, so that a batch may be cut into any pieces, and their result."""
    inputs = make_inputs(server.work / "still", dropout=0.0)
    run = server.work / "still" / "run"
    assert server.search(run, inputs=inputs).code == 0
    return inputs, run


def check_state(run):
    """Everything that was kept before a fault can be read; nothing half written is there."""
    journal = Journal(run / "trials")
    assert all(journal.get(key) is not None for key in journal.keys())
    for file in (run / "state").glob("train-*"):
        assert read_tensors(file, sealed=True)
    assert leftovers(run) == []
    assert not (run / ".lock").exists()


def check_resumed(server, run, whole, *settings):
    resumed = server.search(run, *settings)
    assert resumed.code == 0, resumed.err
    assert results_of(run) == results_of(whole[0])
    assert untidy(run) == []
    return resumed


@pytest.mark.parametrize(("do", "code"), [("interrupt", 130), ("terminate", 143)])
@pytest.mark.parametrize("number", [IN_THE_WARM_UP, IN_A_ROUND, IN_THE_TRAINING])
def test_a_signal_saves_the_state(server, whole, tmp_path, do, code, number):
    run = tmp_path / "run"
    stopped = server.search(run, faults=(at(STEP, number, do),))
    assert stopped.code == code
    assert "state saved; run the same command again to resume" in stopped.err
    check_state(run)
    resumed = check_resumed(server, run, whole)
    assert stopped.phases + resumed.phases <= whole[1].phases + 1


@pytest.mark.parametrize("number", range(N_FULL_DISKS))
def test_a_disk_that_is_full_at_one_write(server, whole, tmp_path, number):
    run, writes = tmp_path / "run", whole[1].calls["os:write"]
    fault = at("os:write", 1 + number * (writes - 1) // (N_FULL_DISKS - 1), "disk full")
    failed = server.search(run, faults=(fault,))
    check_disk_error(failed, run)
    check_resumed(server, run, whole)


@pytest.mark.parametrize(
    "fault",
    [
        at("os:fsync", 1, "disk full", match="/state/.tmp-train"),
        at("os:replace", 1, "disk full", match="arch.json"),
        at("os:rename", 1, "disk full", match="adapter"),
        at("os:write", 1, "disk full", match="report.html"),
        at("prunepeft.training.resumable:Resumable.save", 1, "limit files"),
        at("peft:PeftModel.save_pretrained", 1, "limit files"),
    ],
    ids=["fsync", "rename", "adapter", "report", "file size", "file size in a library"],
)
def test_a_disk_that_refuses(server, whole, tmp_path, fault):
    run = tmp_path / "run"
    check_disk_error(server.search(run, faults=(fault,)), run)
    resumed = check_resumed(server, run, whole)
    assert resumed.phases <= 2
    assert (run / "report" / "report.html").is_file()


def check_disk_error(failed, run):
    assert failed.code == 6, failed.err
    message = next(line for line in failed.err.splitlines() if line.startswith("error: "))
    assert "cannot write" in message
    assert str(run) in message
    assert "bytes are free" in message
    check_state(run)


@pytest.mark.parametrize("number", [1, IN_A_ROUND, IN_THE_TRAINING])
def test_memory_that_ran_out_once_halves_the_micro_batch(server, still, tmp_path, number):
    inputs, expected = still
    run, fault = tmp_path / "run", at(STEP, number, "out of memory")
    attempt = server.search(run, inputs=inputs, faults=(fault,))
    assert attempt.code == 0, attempt.err
    assert "out of memory with 1 pieces" in attempt.err
    assert (run / "best/arch.json").read_bytes() == (expected / "best/arch.json").read_bytes()
    got, want = (json.loads((p / "result.json").read_text()) for p in (run, expected))
    for part in ("search", "train"):
        assert got[part]["steps"] == want[part]["steps"]
    assert got["metric"]["value"] == pytest.approx(want["metric"]["value"], rel=1e-3)


def test_memory_that_never_suffices(server, whole, tmp_path):
    run = tmp_path / "run"
    fault = at(STEP, IN_A_ROUND, "out of memory", until=10**6)
    failed = server.search(run, faults=(fault,))
    assert failed.code == 5
    assert failed.err.count("out of memory with") == 5
    assert "train.max_length" in failed.err
    check_state(run)
    check_resumed(server, run, whole)


def test_memory_that_ran_out_in_evaluation_halves_its_batch(server, still, tmp_path):
    inputs, expected = still
    fault = at("transformers:Trainer.prediction_step", 1, "out of memory", until=4)
    attempt = server.search(tmp_path / "run", inputs=inputs, faults=(fault,))
    assert attempt.code == 0, attempt.err
    assert attempt.err.count("out of memory in evaluation") == 4
    assert results_of(tmp_path / "run") == results_of(expected)


def test_memory_that_never_suffices_in_evaluation(server, whole, tmp_path):
    run = tmp_path / "run"
    fault = at("transformers:Trainer.prediction_step", 1, "out of memory", until=10**6)
    failed = server.search(run, faults=(fault,))
    assert failed.code == 5
    assert "lower train.eval_batch_size (now 64)" in failed.err
    check_state(run)
    assert check_resumed(server, run, whole).phases == 2


@pytest.mark.parametrize("number", [IN_THE_WARM_UP, IN_A_ROUND, IN_THE_TRAINING])
def test_a_loss_that_is_not_a_number(server, whole, tmp_path, number):
    run, fault = tmp_path / "run", at(STEP, number, "nan", when="after")
    failed = server.search(run, faults=(fault,))
    assert failed.code == 2, failed.err
    assert "the training loss became nan; lower train.lr" in failed.err
    check_state(run)
    check_resumed(server, run, whole)


def test_the_second_process_on_a_folder_leaves(server, whole, tmp_path):
    run = tmp_path / "run"
    first = server.search(run, faults=(at(STEP, IN_A_ROUND, "stop"),))
    assert first.code == "stopped"
    second = server.search(run)
    assert (second.code, second.phases) == (7, 0)
    assert f"in use by process {first.pid}" in second.err
    os.kill(first.pid, signal.SIGCONT)
    assert server.wait(first).code == 0
    assert results_of(run) == results_of(whole[0])


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("settings", "suffix"), [((), ".json"), ((KEEP,), ".json"), ((KEEP,), ".safetensors")]
)
def test_a_damaged_entry_is_computed_again(server, tmp_path, settings, suffix):
    expected, run = tmp_path / "expected", tmp_path / "run"
    assert server.search(expected, *settings).code == 0
    killed = server.search(run, *settings, faults=(at(STEP, IN_THE_TRAINING, "kill"),))
    damage(min((run / "trials").glob(f"*{suffix}")))
    resumed = check_resumed(server, run, (expected,), *settings)
    assert resumed.err.count("computed again because it is damaged") == 1
    assert (killed.phases, resumed.phases) == (7, 1 + 1)


def test_a_damaged_training_state_starts_the_training_again(server, whole, tmp_path):
    run = tmp_path / "run"
    server.search(run, faults=(at(STEP, IN_THE_TRAINING, "kill"),))
    (state,) = (run / "state").glob("train-*")
    damage(state)
    resumed = check_resumed(server, run, whole)
    assert "its state is damaged" in resumed.err
    assert resumed.phases == 2


@pytest.mark.parametrize(
    "name",
    [
        "best/arch.json",
        "best/adapter/adapter_model.safetensors",
        "best/adapter/adapter_config.json",
        "history.json",
        "result.json",
        "state/manifest.json",
    ],
)
@pytest.mark.parametrize("how", [damage, Path.unlink], ids=["flipped", "missing"])
def test_the_same_command_repairs_a_finished_run(server, whole, finished, name, how):
    how(finished / name)
    repaired = check_resumed(server, finished, whole)
    assert repaired.phases == 0
    assert server.search(finished).phases == 0


def test_a_changed_setting_is_named(server, whole, finished):
    before = results_of(finished)
    refused = server.search(finished, "train.epochs=3")
    assert (refused.code, refused.phases) == (2, 0)
    assert "train.epochs: 2 -> 3" in refused.err
    assert results_of(finished) == before


def test_a_changed_setting_is_named_before_the_end(server, whole, tmp_path):
    run = tmp_path / "run"
    server.search(run, faults=(at(STEP, IN_A_ROUND, "interrupt"),))
    refused = server.search(run, "search.rounds=3", "seed=1")
    assert (refused.code, refused.phases) == (2, 0)
    assert "search.rounds: 2 -> 3" in refused.err
    assert "seed: 0 -> 1" in refused.err
    check_resumed(server, run, whole)


def test_paths_with_spaces_and_other_letters(server, whole, tmp_path):
    folder = tmp_path / "ein Läufer, 走る 'q'"
    inputs = make_inputs(folder / "in put")
    attempt = server.search(folder / "aus gabe", inputs=inputs)
    assert attempt.code == 0, attempt.err
    got, want = results_of(folder / "aus gabe"), results_of(whole[0])
    for name in ("best/arch.json", "best/adapter/adapter_model.safetensors"):
        assert got[name] == want[name]


@pytest.mark.parametrize(
    "env",
    [
        {"HOME": None},
        {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"},
        {"LC_ALL": "C", "LANG": None, "TZ": "Asia/Kathmandu"},
        {"TMPDIR": "/dev/shm"},
    ],
    ids=["no home", "comma decimals", "plain C", "other TMPDIR"],
)
def test_surroundings_do_not_matter(server, whole, tmp_path, env):
    attempt = server.search(tmp_path / "run", env=env)
    assert attempt.code == 0, attempt.err
    assert results_of(tmp_path / "run") == results_of(whole[0])
