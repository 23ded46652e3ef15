"""The folder of one run: its layout, who may write in it, and whether it is done."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from prunepeft.errors import CheckpointError, ConfigError, LockedError
from prunepeft.state.events import append_line, read_lines
from prunepeft.state.files import (
    clean_temporaries,
    disk_error,
    json_bytes,
    read_bytes,
    remove_tree,
    write_json,
    write_text,
)
from prunepeft.state.folder import verify_files, write_manifest
from prunepeft.state.journal import Journal
from prunepeft.state.lock import FolderLock

log = logging.getLogger(__name__)

# result.json goes first when a run is deleted, so that a half deleted run is never "done".
FILES = (
    "result.json",
    "history.json",
    "environment.json",
    "data.json",
    "events.jsonl",
    "metrics.jsonl",
    "README.md",
)
FOLDERS = ("state", "trials", "base", "best", "exports", "report", "logs")
RESUME_MODES = ("auto", "never")
_LOCK = ".lock"


class RunFolder:
    """Paths, lock, journal and logs of one run. Making the object touches nothing on the disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.data_file = self.path / "data.json"
        self.events_file = self.path / "events.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.history_file = self.path / "history.json"
        self.readme_file = self.path / "README.md"
        self.state_dir = self.path / "state"
        self.manifest_file = self.state_dir / "manifest.json"
        self.trials_dir = self.path / "trials"
        self.base_dir = self.path / "base"
        self.best_dir = self.path / "best"
        self.arch_file = self.best_dir / "arch.json"
        self.strategy_file = self.best_dir / "strategy.json"
        self.adapter_dir = self.best_dir / "adapter"
        self.exports_dir = self.path / "exports"
        self.report_dir = self.path / "report"
        self.report_file = self.report_dir / "report.html"
        self.figures_dir = self.report_dir / "figures"
        self.tables_dir = self.report_dir / "tables"
        self.log_file = self.path / "logs" / "run.log"
        self.lock_file = self.path / _LOCK
        self.journal = Journal(self.trials_dir)
        self._lock = FolderLock(self.lock_file)
        self._config_seen: bytes | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        resume: str = "auto",
        overwrite: bool = False,
        ignore: Sequence[str] = (),
    ) -> "RunFolder":
        """Make the folder of a new run, or open that of a run with the same settings to go on.

        Temporary files of interrupted writers are removed. The folder is locked only during this
        call: hold `lock()` while working in it.

        Args:
            path: The folder; it may not exist yet.
            config: All settings, as plain JSON values.
            resume: `auto`, or `never` to refuse a folder that holds a run.
            overwrite: Delete the run that is there; files of other origin stay.
            ignore: Dotted keys that may differ on resume; `a` also covers `a.b`.

        Raises:
            ConfigError: if the folder holds other things or a run with other settings, or `path`
                is a file.
            DiskError: if the folder cannot be written.
            LockedError: if another process works in it.
        """
        if resume not in RESUME_MODES:
            raise ConfigError(f"resume is {resume!r}; use one of {', '.join(RESUME_MODES)}.")
        folder = cls(path)
        plain = json.loads(json_bytes(config, folder.config_file))
        folder.check_place()
        folder._make(folder.path)
        with folder.lock():
            clean_temporaries(folder.path)
            if folder.is_run and not overwrite:
                folder._check_resume(plain, resume, ignore)
            else:
                folder._start(plain)
            for name in ("state", "trials", "logs"):
                folder._make(folder.path / name)
            folder._config_seen = read_bytes(folder.config_file)
        return folder

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    @property
    def done(self) -> bool:
        """Whether `finish` was called and everything it listed is still as it was."""
        if not self.result_file.is_file() or not self.manifest_file.is_file():
            return False
        try:
            return self.result_file.name in verify_files(self.manifest_file, self.path)
        except CheckpointError as error:
            log.warning("the finished run in %s is not intact: %s", self.path, error)
            return False

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, then the manifest of it, the history, data, `base/` and `best/`.

        Raises:
            StateError: if the result is not JSON or holds NaN.
            DiskError: if the disk refuses; the run is then not `done`.
        """
        write_json(self.result_file, result)
        files = [self.result_file, self.history_file, self.data_file]
        files += [*self.base_dir.rglob("*"), *self.best_dir.rglob("*")]
        write_manifest(self.manifest_file, self.path, sorted(f for f in files if f.is_file()))

    def read_config(self) -> dict[str, Any]:
        """Return the settings the run was started with.

        Raises:
            CheckpointError: if `config.yaml` is missing, damaged, or uses YAML references.
        """
        try:
            text = read_bytes(self.config_file).decode("utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise ValueError("it uses YAML references, which prunepeft never writes")
            config = yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{self.config_file} cannot be read: {error}. Restore it, or use another --output."
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.config_file} holds no settings; use another --output.")
        return config

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder for a while; may be nested.

        Raises:
            LockedError: if another process works in it, or has overwritten it since `open`.
        """
        self._lock.acquire()
        try:
            seen = self._config_seen
            if seen is not None and seen != read_bytes(self.config_file):
                raise LockedError(
                    f"another process has started a run with other settings in {self.path}; "
                    "run the same command again to see which."
                )
            yield
        finally:
            self._lock.release()

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append what happened to `events.jsonl`, with the time."""
        append_line(self.events_file, {"time": _now(), "kind": kind, **fields})

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events in order; a line torn by a crash is left out."""
        return read_lines(self.events_file)

    def log_metrics(self, **fields: Any) -> None:
        """Append measured values to `metrics.jsonl`, with the time; NaN becomes null."""
        append_line(self.metrics_file, {"time": _now(), **fields})

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all measurements in order; a line torn by a crash is left out."""
        return read_lines(self.metrics_file)

    def check_place(self) -> None:
        """Raise ConfigError if `open` would refuse this path; touches nothing.

        Raises:
            ConfigError: if it is a file or a folder with other things and no run.
        """
        if self.path.is_dir():
            foreign = sorted(p.name for p in self.path.iterdir() if not _is_ours(p.name))
            if foreign and not self.is_run:
                raise ConfigError(
                    f"{self.path} is not empty and holds no run (it has {foreign[0]!r}); use an "
                    "--output folder that is new or empty. Nothing was changed."
                )
            return
        for place in (self.path, *self.path.absolute().parents):
            if place.is_dir():
                return
            if place.exists() or place.is_symlink():
                raise ConfigError(
                    f"{place} is a file or a broken link, not a folder; use another --output."
                )

    def _check_resume(self, config: dict[str, Any], resume: str, ignore: Sequence[str]) -> None:
        if resume == "never":
            raise ConfigError(
                f"{self.path} holds a run already and resume is 'never'; use another --output, "
                "--resume auto to go on, or --overwrite to delete that run."
            )
        changes = _differences(self.read_config(), config, ignore)
        if changes:
            more = f" and {len(changes) - 10} more" if len(changes) > 10 else ""
            raise ConfigError(
                f"{self.path} holds a run with other settings: {'; '.join(changes[:10])}{more}. "
                "Use another --output for the new settings, or --overwrite to delete that run."
            )

    def _start(self, config: dict[str, Any]) -> None:
        """Delete what a run left here, then write the settings, which mark the folder as a run."""
        if self.is_run:
            try:
                for name in (*FILES, *FOLDERS):
                    remove_tree(self.path / name)
            except OSError as error:
                raise disk_error(self.path, error, 0) from error
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error, 0) from error


def _is_ours(name: str) -> bool:
    """Return whether a run that died before its settings were written may have left `name`."""
    return name == _LOCK or re.fullmatch(r"\.tmp-.+-\d+", name) is not None


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str]
) -> list[str]:
    """Return `key: old -> new` for every dotted key whose value differs."""
    before, after = _flatten(old), _flatten(new)
    lines = []
    for key in dict.fromkeys((*before, *after)):
        left, right = (repr(side[key]) if key in side else "(not set)" for side in (before, after))
        if left != right and not any(key == name or key.startswith(f"{name}.") for name in ignore):
            lines.append(f"{key}: {left:.200} -> {right:.200}")
    return lines


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
