"""Folders: whole, or noticed."""

import signal

import pytest

from prunepeft.errors import CheckpointError, DiskError, StateError
from prunepeft.state import clean_temporaries, verify_folder, write_folder, write_json
from tests.disk_faults import calls_in, damaged_versions, failing_call, leftovers, run_python


def fill(version):
    def writer(place):
        (place / "deep").mkdir()
        (place / "deep" / "a.txt").write_text(version)
        write_json(place / "b.json", {"version": version})

    return writer


def version_of(folder):
    verify_folder(folder)
    return (folder / "deep" / "a.txt").read_text()


def test_write_folder_and_replace_it(tmp_path):
    target = tmp_path / "x" / "adapter"
    write_folder(target, fill("one"))
    assert set(verify_folder(target)) == {"deep/a.txt", "b.json"}
    write_folder(target, fill("two"))
    assert version_of(target) == "two"
    assert [p.name for p in target.parent.iterdir()] == ["adapter"]


def test_every_refused_call_leaves_a_whole_folder(tmp_path):
    target = tmp_path / "adapter"
    write_folder(target, fill("old"))
    total = calls_in(lambda: write_folder(target, fill("old")))
    assert total >= 10
    for number in range(1, total + 1):
        with failing_call(number), pytest.raises(DiskError, match="No space left"):
            write_folder(target, fill("new"))
        assert version_of(target) == ("new" if number == total else "old"), number
        assert leftovers(tmp_path) == []
        write_folder(target, fill("old"))


def test_a_library_that_tells_the_errno_in_text(tmp_path):
    def writer(place):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskError, match="No space left"):
        write_folder(tmp_path / "a", writer)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_writer_pass(tmp_path):
    def writer(place):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "a", writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 2])
def test_kill_around_the_two_renames(tmp_path, number):
    target = tmp_path / "adapter"
    write_folder(target, fill("old"))
    code = (
        "import os, signal, sys\n"
        "from prunepeft.state import write_folder\n"
        "from pathlib import Path\n"
        "real, count = os.rename, []\n"
        "def rename(*a):\n"
        "    count.append(1)\n"
        f"    if len(count) == {number}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*a)\n"
        "os.rename = rename\n"
        "write_folder(sys.argv[1], lambda p: (p / 'n').write_text('new'))"
    )
    assert run_python(code, target).returncode == -signal.SIGKILL
    clean_temporaries(tmp_path)
    assert version_of(target) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_links_and_a_taken_manifest_name_are_refused(tmp_path):
    with pytest.raises(StateError, match="is a link"):
        write_folder(tmp_path / "a", lambda place: (place / "l").symlink_to("/etc/hosts"))
    with pytest.raises(StateError, match="is taken by the manifest"):
        write_folder(tmp_path / "a", lambda place: (place / "manifest.json").write_text("{}"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StateError, match="not a plain folder"):
        write_folder(tmp_path / "file", fill("x"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["deep/a.txt", "b.json", "manifest.json"])
def test_every_damage_to_a_folder_is_noticed(tmp_path, name):
    target = tmp_path / "adapter"
    write_folder(target, fill("some content"))
    file = target / name
    for data in damaged_versions(file.read_bytes()):
        whole = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify_folder(target)
        file.write_bytes(whole)
    verify_folder(target)


def test_missing_extra_and_linked_files_are_named(tmp_path):
    target = tmp_path / "adapter"
    write_folder(target, fill("x"))
    (target / "extra.bin").write_text("?")
    with pytest.raises(CheckpointError, match=r"extra\.bin is extra"):
        verify_folder(target)
    (target / "extra.bin").unlink()
    (target / "b.json").rename(tmp_path / "b.json")
    with pytest.raises(CheckpointError, match=r"b\.json is missing"):
        verify_folder(target)
    (target / "b.json").symlink_to(tmp_path / "b.json")
    with pytest.raises(CheckpointError, match="is a link"):
        verify_folder(target)
    with pytest.raises(CheckpointError, match=r"manifest\.json does not exist"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("name", ["../b.json", "/etc/hosts", "", "a\0b", "..\\b"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    entry = {"size": 1, "sha256": "0"}
    write_json(tmp_path / "manifest.json", {"schema_version": 1, "files": {name: entry}})
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify_folder(tmp_path)


def test_a_manifest_of_another_version(tmp_path):
    write_json(tmp_path / "manifest.json", {"schema_version": 2, "files": {}})
    with pytest.raises(CheckpointError, match="schema version 2"):
        verify_folder(tmp_path)
