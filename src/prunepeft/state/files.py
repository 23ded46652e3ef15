"""The one writer: every artefact reaches the disk whole or not at all."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepeft.errors import CheckpointError, DiskError, StateError

WRITE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
)
_ACCESS_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})
_UNSUPPORTED_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
# Long names are cut in the temporary name so that it stays below the 255 bytes of common disks.
_NAME_CUT = 40


def disk_free(path: str | os.PathLike[str]) -> int:
    """Return the bytes free for this user where `path` is, or will be once its folder exists."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_error(path: Path, error: OSError, needed: int) -> DiskError:
    """Return the DiskError that tells what could not be written and what to do about it."""
    folder = path.parent
    try:
        free = f"{disk_free(folder)} bytes are free"
    except OSError:
        free = "the free space is unknown"
    if error.errno in _ACCESS_ERRNOS:
        advice = "make the folder writable or use another --output"
    else:
        advice = "make room, or use another --output on a larger disk"
    result = DiskError(
        f"cannot write {path.name} in {folder}: {error.strerror or error}. It needs {needed} bytes "
        f"and {free}; {advice}, then run the same command again. The last good state is kept."
    )
    result.errno = error.errno
    return result


def temporary_path(path: Path) -> Path:
    """Return where `path` is built: in its own folder, so that the rename cannot cross disks."""
    return path.with_name(f".tmp-{path.name[:_NAME_CUT]}-{os.getpid()}")


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable; a disk that cannot do so is left alone."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_SYNC:
            raise
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write `data` to an open file in as many calls as the disk takes."""
    view = memoryview(data)
    while view:
        written = os.write(handle, view)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file `path` by `data`: after a crash it is the whole old or the whole new one.

    Steps: temporary file in the same folder, write, fsync, rename, fsync of the folder.

    Raises:
        DiskError: if the disk refuses; the temporary file is gone and the old file is untouched
            (only when the very last step fails the new file is there, whole).
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        _discard(temporary)
        raise disk_error(target, error, len(data)) from error
    except BaseException:
        _discard(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file `path` by `text` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace the file `path` by `value` as JSON, keys in the order given.

    Raises:
        StateError: if a value is NaN, infinite or not JSON; the message says at which key.
        DiskError: as in `write_bytes`.
    """
    write_bytes(path, json_bytes(value, Path(path)))


def json_bytes(value: Any, path: Path) -> bytes:
    """Return `value` as indented JSON; `path` only names the file in the error.

    There is no newline at the end: any cut then breaks the last bracket and is noticed.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        where = next(unwritable_values(value), str(error))
        raise StateError(
            f"cannot write {path} as JSON: {where}. Allowed are finite numbers, text, true, false, "
            "null, lists and mappings; replace the value before it is saved."
        ) from error
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # file names may hold bytes that are no text
        return json.dumps(value, indent=1, allow_nan=False).encode("ascii")


def canonical_json(value: Any) -> bytes:
    """Return the one JSON spelling of `value`: sorted keys, no spaces, ASCII.

    Raises:
        StateError: if it holds something JSON has no form for, or NaN.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        where = next(unwritable_values(value), str(error))
        raise StateError(
            f"cannot make a key from {where}; use finite numbers, text, lists and "
            "mappings with text keys."
        ) from error
    return text.encode("ascii")


def unwritable_values(value: Any, where: str = "", depth: int = 0) -> Iterator[str]:
    """Yield `key is value` for every value in a tree that JSON cannot hold."""
    if depth > 100:
        yield f"{where[:200]} is nested too deeply"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{where or 'the value'} is {value!r}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from unwritable_values(item, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from unwritable_values(item, f"{where}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, str | int):
        yield f"{where or 'the value'} is a {type(value).__name__}"


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        CheckpointError: if it is missing, a folder or cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise CheckpointError(f"{file} {reason}; give the path of a file that prunepeft wrote.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); check permissions and the disk."
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file.

    Raises:
        CheckpointError: if it is missing, not UTF-8, not JSON, holds NaN or one key twice.
    """
    return parse_json(read_bytes(path), Path(path))


def parse_json(data: bytes, path: Path) -> Any:
    """Return the value of JSON text; `path` only names the file in the error."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); it is damaged or was not written by prunepeft. "
            "Restore it from a copy, or delete it and run the same command again."
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean_temporaries(folder: Path) -> list[Path]:
    """Remove what interrupted writers left under `folder`; a folder moved aside is put back.

    Call it only while no other process writes there.

    Returns:
        The paths that were removed or put back.
    """
    found = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            match = re.fullmatch(r"\.tmp-(.+)-\d+(\.old)?", name)
            if match is None:
                continue
            path, home = Path(root, name), Path(root, match[1])
            if match[2] and not home.exists():
                os.rename(path, home)
            else:
                remove_tree(path)
            found.append(path)
        folders[:] = [name for name in folders if not name.startswith(".tmp-")]
    return found


def remove_tree(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value
