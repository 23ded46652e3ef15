"""Lines of JSON that grow: what happened and what was measured."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepeft.errors import StateError
from prunepeft.state.files import disk_error, write_all

log = logging.getLogger(__name__)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line. A line torn by a crash is ended first; NaN and infinity become null.

    Raises:
        StateError: if a value is not JSON.
        DiskError: if the disk refuses.
    """
    try:
        line = json.dumps(_finite(record), allow_nan=False).encode("ascii") + b"\n"
    except (TypeError, ValueError) as error:
        raise StateError(
            f"cannot log {record!r:.300} to {path}: {error}; use JSON values."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.lseek(handle, 0, os.SEEK_END)
            if size:
                os.lseek(handle, size - 1, os.SEEK_SET)
                line = line if os.read(handle, 1) == b"\n" else b"\n" + line
            write_all(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise disk_error(path, error, len(line)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines; a torn line is left out with a warning."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.warning("%s: line %d is torn and left out", path, number)
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value
