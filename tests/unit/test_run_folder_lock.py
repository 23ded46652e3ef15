"""The lock: one live process, and never a dead one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prunepeft.errors import LockedError
from prunepeft.state import RunFolder
from tests.disk_faults import run_python

HOLD = (
    "import sys, time; from prunepeft.state import RunFolder\n"
    "folder = RunFolder(sys.argv[1])\n"
    "folder.path.mkdir(exist_ok=True)\n"
    "with folder.lock():\n"
    "    print('held', flush=True); time.sleep(60)\n"
)


def start_holder(path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_process_keeps_others_out(tmp_path):
    holder = start_holder(tmp_path)
    try:
        with pytest.raises(LockedError, match=f"in use by process {holder.pid} on host") as error:
            RunFolder.open(tmp_path, config={})
        assert socket.gethostname() in str(error.value)
        assert error.value.exit_code == 7
        assert not (tmp_path / "config.yaml").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, caplog, reaped):
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.communicate()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    folder = RunFolder.open(tmp_path, config={})
    assert f"the lock of process {holder.pid}, which has ended" in caplog.text
    assert not folder.lock_file.exists()
    holder.stdout.close()
    holder.wait()


def forge(folder, **changes):
    """Leave a lock as this live process would, with some fields changed."""
    folder.path.mkdir(exist_ok=True)
    with folder.lock():
        owner = json.loads(folder.lock_file.read_text())
    folder.lock_file.write_text(json.dumps({**owner, **changes}))


def test_a_lock_of_another_host(tmp_path):
    folder = RunFolder(tmp_path)
    forge(folder, host="node-17", pid=12)
    with pytest.raises(LockedError, match="by process 12 on host node-17") as error:
        RunFolder.open(tmp_path, config={})
    assert f"remove {folder.lock_file}" in str(error.value)
    assert folder.lock_file.exists()


@pytest.mark.parametrize(
    "changes", [{"boot": "another start"}, {"process_start": 1}, {"pid": 2**40}]
)
def test_a_later_process_with_the_same_number_is_not_the_owner(tmp_path, changes):
    forge(RunFolder(tmp_path), **changes)
    RunFolder.open(tmp_path, config={})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_unreadable_lock_is_taken_over(tmp_path, monkeypatch, text):
    monkeypatch.setattr("prunepeft.state.lock._SECONDS_TO_FILL", 0.1)
    (tmp_path / ".lock").write_text(text)
    RunFolder.open(tmp_path, config={})
    assert not (tmp_path / ".lock").exists()


def test_the_same_object_may_lock_twice_another_may_not(tmp_path):
    folder = RunFolder.open(tmp_path, config={})
    with folder.lock():
        with folder.lock():
            pass
        assert folder.lock_file.exists()
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), RunFolder(tmp_path).lock():
            pass
    assert not folder.lock_file.exists()


def test_the_lock_is_given_back_after_an_error(tmp_path):
    folder = RunFolder.open(tmp_path, config={})
    with pytest.raises(ZeroDivisionError), folder.lock():
        raise ZeroDivisionError
    assert not folder.lock_file.exists()


def test_a_lock_taken_by_another_since_is_not_removed(tmp_path):
    folder = RunFolder.open(tmp_path, config={})
    with folder.lock():
        folder.lock_file.unlink()
        forge(RunFolder(tmp_path), host="node-17")
    assert folder.lock_file.exists()


def test_a_run_overwritten_between_open_and_lock(tmp_path):
    folder = RunFolder.open(tmp_path, config={})
    RunFolder.open(tmp_path, config={"seed": 1}, overwrite=True)
    with pytest.raises(LockedError, match="with other settings"), folder.lock():
        pass
    assert not folder.lock_file.exists()


def test_many_processes_take_over_one_stale_lock_one_at_a_time(tmp_path):
    forge(RunFolder(tmp_path), process_start=1)
    code = (
        "import glob, os, sys, time; from prunepeft.errors import LockedError\n"
        "from prunepeft.state import RunFolder\n"
        "try:\n"
        "    with RunFolder(sys.argv[1]).lock():\n"
        "        for _ in range(600):\n"
        "            if len(glob.glob(sys.argv[1] + '/refused-*')) == 3: break\n"
        "            time.sleep(0.05)\n"
        "    print('ran')\n"
        "except LockedError:\n"
        "    open(f'{sys.argv[1]}/refused-{os.getpid()}', 'x').close(); print('locked')"
    )
    outputs = []
    threads = [
        threading.Thread(target=lambda: outputs.append(run_python(code, tmp_path).stdout.strip()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == ["locked", "locked", "locked", "ran"]
