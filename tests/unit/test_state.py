"""One file: old or new, never half."""

import errno
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.errors import CheckpointError, DiskError, StateError
from prunepeft.state import (
    clean_temporaries,
    disk_free,
    read_json,
    verify_folder,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)
from tests.disk_faults import calls_in, failing_call, leftovers, run_python


@pytest.mark.parametrize("name", ["a.json", "with space.json", "naïve-名前.json", "x" * 240])
def test_write_and_read_json(tmp_path, name):
    path = tmp_path / "new folder" / name
    value = {"b": 1, "a": [0.1, 1e-9, None, True, "ü", -0.0], "empty": {}}
    write_json(path, value)
    assert read_json(path) == value
    assert list(read_json(path)) == ["b", "a", "empty"]
    assert repr(read_json(path)["a"][5]) == "-0.0"
    assert leftovers(tmp_path) == []


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_exactly(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "float.json"
    write_json(path, {"x": value})
    assert repr(read_json(path)["x"]) == repr(value)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"a\.b\[1\] is nan"),
        ({"a": float("inf")}, "a is inf"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": torch.ones(1)}, "a is a Tensor"),
        ({(1, 2): 3}, "keys must be"),
    ],
)
def test_json_refuses_what_it_cannot_hold(tmp_path, value, where):
    with pytest.raises(StateError, match=where):
        write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_a_loop(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(StateError, match="nested too deeply"):
        write_json(tmp_path / "a.json", loop)


def test_json_holds_file_names_that_are_no_text(tmp_path):
    write_json(tmp_path / "a.json", "file-\udcff")
    assert read_json(tmp_path / "a.json") == "file-\udcff"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000],
)
def test_broken_json_is_named(tmp_path, data):
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"broken\.json is not valid JSON"):
        read_json(path)


def test_missing_and_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.json does not exist"):
        read_json(tmp_path / "no.json")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_json(tmp_path)


def test_every_truncation_of_json_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5], "b": "text"})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_json(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_refused_write_keeps_the_old_file(tmp_path, code):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    total = calls_in(lambda: write_text(path, "old"))
    assert total == 4  # write, fsync, rename, fsync of the folder
    for number in range(1, total + 1):
        with (
            failing_call(number, code),
            pytest.raises(DiskError, match=r"It needs 6 bytes and \d+ bytes are free") as error,
        ):
            write_text(path, "newest")
        assert str(tmp_path) in str(error.value)
        assert error.value.exit_code == 6
        assert error.value.errno == code
        assert path.read_text() == ("newest" if number == total else "old")
        assert leftovers(tmp_path) == []
        write_text(path, "old")


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    write_bytes(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_file_size_limit_of_the_system(tmp_path):
    code = (
        "import resource, signal, sys; from prunepeft.state import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_bytes(sys.argv[1], b'x' * 5000)"
    )
    path = tmp_path / "a"
    path.write_bytes(b"old")
    done = run_python(code, path)
    assert "DiskError: cannot write a" in done.stderr
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_access_errors_advise_on_access(tmp_path):
    with failing_call(1, errno.EACCES), pytest.raises(DiskError, match="make the folder writable"):
        write_text(tmp_path / "a", "x")


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    def mkdir(path, mode=0o777):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(DiskError, match=r"cannot write a in .*deep: Read-only"):
        write_text(tmp_path / "deep" / "a", "x")
    with pytest.raises(DiskError, match="Read-only"):
        write_folder(tmp_path / "deep" / "b", lambda place: None)


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


def test_umask_and_odd_paths(tmp_path):
    folder = tmp_path / "größe 名"
    old = os.umask(0o077)
    try:
        write_text(folder / "a b", "x")
        write_folder(folder / "c d", lambda place: write_text(place / "ü", "x"))
    finally:
        os.umask(old)
    assert (folder / "a b").stat().st_mode & 0o777 == 0o600
    assert set(verify_folder(folder / "c d")) == {"ü"}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_kill_before_the_rename_keeps_the_old_file(tmp_path, call):
    path = tmp_path / "a.json"
    write_json(path, {"v": "old"})
    code = (
        "import os, signal, sys; from prunepeft.state import write_json\n"
        f"os.{call} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_json(sys.argv[1], {'v': 'new'})"
    )
    assert run_python(code, path).returncode == -signal.SIGKILL
    assert read_json(path) == {"v": "old"}
    assert len(leftovers(tmp_path)) == 1
    clean_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_disk_free_of_a_path_to_come(tmp_path):
    assert disk_free(tmp_path / "not" / "yet") > 0


def test_the_package_starts_without_torch():
    done = run_python("import sys, prunepeft.state; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
