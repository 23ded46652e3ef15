"""Folders that appear whole, with a manifest that tells later whether they still are."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state.files import (
    WRITE_ERRNOS,
    disk_error,
    file_sha256,
    read_json,
    remove_tree,
    sync_folder,
    write_json,
)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def write_folder(target: str | os.PathLike[str], writer: Callable[[Path], None]) -> None:
    """Build the folder `target` beside its place and move it there when it is complete.

    Steps: `writer` fills an empty folder, fsync of every file, `manifest.json`, rename. A folder
    that was there is moved aside first and deleted after; `clean_temporaries` puts it back if the
    process dies in between.

    Args:
        target: The folder to make or replace.
        writer: Called with the empty folder to fill. It must not write a `manifest.json`.

    Raises:
        StateError: if `target` is a file, or `writer` leaves a link or a `manifest.json`.
        DiskError: if the disk refuses; the folder that was there is kept.
    """
    place = Path(target)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise StateError(
            f"{place} is not a plain folder, so it cannot be replaced; move it away first."
        )
    temporary = place.with_name(f".tmp-{place.name}-{os.getpid()}")
    aside = place.with_name(f"{temporary.name}.old")
    try:
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        writer(temporary)
        _sync_tree(temporary)
        write_manifest(temporary / MANIFEST, temporary, _files(temporary))
        _swap(temporary, place, aside)
    except BaseException as error:
        size = _size(temporary)
        _roll_back(temporary, place, aside)
        number = _write_errno(error)
        if number is None:
            raise
        raise disk_error(place, OSError(number, os.strerror(number)), size) from error


def _swap(temporary: Path, place: Path, aside: Path) -> None:
    if place.exists():
        os.rename(place, aside)
    os.rename(temporary, place)
    sync_folder(place.parent)
    remove_tree(aside)


def _roll_back(temporary: Path, place: Path, aside: Path) -> None:
    try:
        if aside.exists() and not place.exists():
            os.rename(aside, place)
        remove_tree(aside)
        remove_tree(temporary)
    except OSError:
        return  # what is left carries a temporary name and goes with the next clean_temporaries


def _write_errno(error: BaseException) -> int | None:
    """Return the errno of a refused write, also when a library only tells it in its text."""
    if isinstance(error, OSError):
        return error.errno if error.errno in WRITE_ERRNOS else None
    match = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(match[1]) if match and int(match[1]) in WRITE_ERRNOS else None


def write_manifest(path: Path, root: Path, files: Iterable[Path]) -> None:
    """Write the sizes and SHA-256 of `files` (paths inside `root`) to `path`."""
    entries = {
        file.relative_to(root).as_posix(): {
            "size": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in files
    }
    write_json(path, {"schema_version": SCHEMA_VERSION, "files": entries})


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return relative path -> {"size", "sha256"}.

    Raises:
        CheckpointError: if it is damaged, of another version, or a path leaves the folder.
    """
    value = read_json(path)
    files = value.get("files") if isinstance(value, Mapping) else None
    if not isinstance(files, dict) or set(value) != {"schema_version", "files"}:
        raise CheckpointError(f"{path} is not a manifest of prunepeft; it is damaged.")
    if value["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {value['schema_version']!r}, this prunepeft reads "
            f"{SCHEMA_VERSION}; use the version that wrote it."
        )
    for name, entry in files.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name or not name:
            raise CheckpointError(f"{path} names {name[:100]!r}, which is outside its folder.")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(
                f"{path} has no size and SHA-256 for {name[:100]!r}; it is damaged."
            )
    return files


def verify_files(manifest: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Check every file that `manifest` lists against `root` and return the list.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    files = read_manifest(manifest)
    for name, entry in files.items():
        file = root / name
        if file.is_symlink() or not file.resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file} is a link out of its folder; put the real file there.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; restore it from a copy, or make it again.")
        if file.stat().st_size != entry["size"] or file_sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} differs from what was saved (its size or SHA-256 does not match "
                f"{manifest.name}); restore it from a copy, or make it again."
            )
    return files


def verify_folder(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Check a folder that `write_folder` made, and return relative path -> {"size", "sha256"}.

    Raises:
        CheckpointError: naming the file that differs, is missing or is extra.
    """
    root = Path(path)
    listed = verify_files(root / MANIFEST, root)
    for file in _files(root):
        if file.relative_to(root).as_posix() not in listed:
            raise CheckpointError(
                f"{file} is extra: it is not in {MANIFEST}; move it out of the folder."
            )
    return listed


def _files(root: Path) -> list[Path]:
    """Return every file under `root` but its manifest, sorted; a link counts as a file."""
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name) for name in (*names, *links)]
    return sorted(file for file in found if file != root / MANIFEST)


def _sync_tree(root: Path) -> None:
    if (root / MANIFEST).exists():
        raise StateError(f"the name {MANIFEST} is taken by the manifest; write another file name.")
    for file in _files(root):
        if file.is_symlink():
            raise StateError(f"{file.name} is a link; write a copy of the file it points to.")
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    for folder, _, _ in os.walk(root, topdown=False):
        sync_folder(Path(folder))


def _size(root: Path) -> int:
    return sum(file.lstat().st_size for file in _files(root)) if root.is_dir() else 0
