"""The run folder: who may use it, when it goes on, when it is done."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.errors import CheckpointError, ConfigError, DiskError, StateError
from prunepeft.state import RunFolder, write_folder, write_json, write_text
from tests.disk_faults import failing_call, leftovers

CONFIG = {"method": "prunepeft", "budget": "1%", "search": {"rounds": 3, "rate": 1e-5}, "seed": 0}


def open_run(path, config=CONFIG, **options):
    return RunFolder.open(path, config=config, **options)


def finished(path):
    folder = open_run(path)
    write_json(folder.arch_file, {"slots": {}})
    write_folder(folder.adapter_dir, lambda place: write_text(place / "weights", "w"))
    write_json(folder.history_file, {"rounds": []})
    folder.finish({"schema_version": 1})
    return folder


@pytest.mark.parametrize("name", ["run", "a/b c/größe 名"])
def test_a_new_folder(tmp_path, name):
    folder = open_run(tmp_path / name)
    assert folder.is_run
    assert not folder.done
    assert folder.read_config() == CONFIG
    assert list(folder.read_config()) == list(CONFIG)
    names = sorted(p.name for p in folder.path.iterdir())
    assert names == ["config.yaml", "logs", "state", "trials"]


def test_the_paths_of_the_layout(tmp_path):
    folder = RunFolder(tmp_path / "r")
    assert not folder.path.exists()
    assert folder.arch_file == tmp_path / "r" / "best" / "arch.json"
    assert folder.adapter_dir == tmp_path / "r" / "best" / "adapter"
    assert folder.report_file == tmp_path / "r" / "report" / "report.html"
    assert folder.journal.folder == tmp_path / "r" / "trials"


def test_the_same_settings_go_on(tmp_path):
    open_run(tmp_path).journal.put("k", {}, {"v": 1})
    (tmp_path / "my notes.txt").write_text("mine")
    again = open_run(tmp_path, {**CONFIG, "json": True}, ignore=["json"])
    assert again.journal.get("k") == {"v": 1}
    assert again.read_config() == CONFIG


def test_other_settings_are_shown(tmp_path):
    open_run(tmp_path)
    config = {"method": "prunepeft", "budget": "2%", "search": {"rounds": 4, "rate": 1e-5}, "x": []}
    with pytest.raises(ConfigError, match="with other settings") as error:
        open_run(tmp_path, config)
    for part in (
        "budget: '1%' -> '2%'",
        "search.rounds: 3 -> 4",
        "seed: 0 -> (not set)",
        "x: (not set) -> []",
        "another --output",
        "--overwrite",
    ):
        assert part in str(error.value)
    assert "rate" not in str(error.value)
    open_run(tmp_path, config, ignore=["budget", "search", "seed", "x"])


def test_many_differences_are_cut(tmp_path):
    open_run(tmp_path, {f"k{i}": 0 for i in range(15)})
    with pytest.raises(ConfigError, match=r"k9: 0 -> 1 and 5 more"):
        open_run(tmp_path, {f"k{i}": 1 for i in range(15)})


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), plain | st.lists(plain, max_size=2), max_size=3))
def test_settings_survive_the_file(tmp_path_factory, config):
    config = json.loads(json.dumps(config).replace("Infinity", "1"))
    path = tmp_path_factory.mktemp("run")
    open_run(path, config)
    open_run(path, config)


def test_resume_modes(tmp_path):
    open_run(tmp_path, resume="never")
    with pytest.raises(ConfigError, match="resume is 'never'"):
        open_run(tmp_path, resume="never")
    with pytest.raises(ConfigError, match="use one of auto, never"):
        open_run(tmp_path, resume="maybe")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=r"not empty and holds no run \(it has 'thesis.tex'\)"
        ):
            open_run(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ConfigError, match="file is a file or a broken link, not a folder"):
            open_run(path)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(DiskError, match="make the folder writable"):
            open_run(tmp_path / "new")
    with failing_call(1, code), pytest.raises(DiskError, match="make the folder writable"):
        open_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_removes_the_run_only(tmp_path):
    folder = finished(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    folder.report_dir.symlink_to(outside)
    (tmp_path / "my notes.txt").write_text("mine")
    folder.log_event("x")
    new = open_run(tmp_path, {"seed": 1}, overwrite=True, resume="never")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["config.yaml", "logs", "my notes.txt", "state", "trials"]
    assert (outside / "keep").exists()
    assert new.read_config() == {"seed": 1}
    assert not new.done


def test_overwrite_stopped_half_way_can_be_repeated(tmp_path):
    finished(tmp_path)
    for number in range(1, 5):
        with failing_call(number), pytest.raises(DiskError):
            open_run(tmp_path, {"seed": 1}, overwrite=True)
        assert RunFolder(tmp_path).is_run
    assert open_run(tmp_path, {"seed": 1}, overwrite=True).read_config() == {"seed": 1}


def test_a_run_that_died_at_birth_starts_again(tmp_path):
    (tmp_path / ".tmp-config.yaml-1").write_text("met")
    assert open_run(tmp_path).read_config() == CONFIG
    assert leftovers(tmp_path) == []


def test_temporary_files_go_and_folders_moved_aside_return(tmp_path):
    folder = finished(tmp_path)
    folder.adapter_dir.rename(folder.best_dir / ".tmp-adapter-7.old")
    (folder.best_dir / ".tmp-adapter-7").mkdir()
    (folder.trials_dir / ".tmp-k.json-7").write_text("{")
    (tmp_path / ".tmp-mine").write_text("no number, so not ours")
    open_run(tmp_path)
    assert [p.name for p in leftovers(tmp_path)] == [".tmp-mine"]
    assert folder.done


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "a: &x [1]\nb: *x", "a: !!python/name:os.system"]
)
def test_damaged_settings_are_refused(tmp_path, text):
    open_run(tmp_path).config_file.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        open_run(tmp_path)


def test_settings_that_are_no_json(tmp_path):
    with pytest.raises(StateError, match="rate is nan"):
        open_run(tmp_path, {"rate": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_done_after_finish(tmp_path):
    folder = finished(tmp_path)
    assert folder.done
    assert open_run(tmp_path).done
    write_text(folder.report_file, "later files do not matter")
    assert folder.done


@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        "history.json",
        "best/arch.json",
        "best/adapter/weights",
        "state/manifest.json",
    ],
)
@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:-1] + b"?", lambda d: b""])
def test_not_done_when_damaged(tmp_path, name, damage):
    folder = finished(tmp_path)
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    assert not folder.done
    file.unlink()
    assert not folder.done


def test_not_done_until_the_last_step(tmp_path):
    folder = open_run(tmp_path)
    for number in range(1, 8):
        with failing_call(number), pytest.raises(DiskError):
            folder.finish({"a": 1})
        assert not folder.done
    with pytest.raises(StateError, match="value is nan"):
        folder.finish({"value": float("nan")})


def test_events_and_metrics(tmp_path):
    folder = RunFolder(tmp_path / "r")
    assert folder.read_events() == []
    folder.log_event("round", number=1, name="ü")
    folder.log_metrics(loss=float("nan"), values=(1.0, float("inf")))
    (event,), (metrics,) = folder.read_events(), folder.read_metrics()
    assert event.pop("time").endswith("+00:00")
    assert event == {"kind": "round", "number": 1, "name": "ü"}
    assert (metrics["loss"], metrics["values"]) == (None, [1.0, None])
    with pytest.raises(StateError, match="use JSON values"):
        folder.log_event("x", value={1, 2})


def test_a_torn_line_is_left_out_and_the_next_is_whole(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.log_event("a")
    folder.log_event("b")
    whole = folder.events_file.read_bytes()
    for cut in range(1, len(whole) // 2):
        folder.events_file.write_bytes(whole[:-cut])
        kinds = ["a"] if cut > 1 else ["a", "b"]
        assert [e["kind"] for e in folder.read_events()] == kinds
        folder.log_event("c")
        assert [e["kind"] for e in folder.read_events()] == [*kinds, "c"]
    assert "torn and left out" in caplog.text


def test_a_full_disk_while_logging(tmp_path):
    with failing_call(1), pytest.raises(DiskError, match=r"cannot write events\.jsonl"):
        RunFolder(tmp_path).log_event("a")
