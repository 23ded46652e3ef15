"""Finished evaluations on disk, so that a run that starts again repeats none of them."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state.files import (
    canonical_json,
    file_sha256,
    json_bytes,
    parse_json,
    read_json,
    write_bytes,
)
from prunepeft.state.tensors import read_tensors, tensors_to_bytes

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def call_key(call: Mapping[str, Any]) -> str:
    """Return the name of a call: the first 20 hex digits of the SHA-256 of its canonical JSON.

    Raises:
        StateError: if the call holds something JSON has no form for.
    Example:
        >>> call_key({"seed": 0, "rank": 8}) == call_key({"rank": 8, "seed": 0})
        True
    """
    return hashlib.sha256(canonical_json(call)).hexdigest()[:20]


class Journal:
    """A folder with one file `<key>.json` per finished call, and its tensors beside it if any."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the result kept under `key`; None if there is none or it is damaged.

        A damaged entry is reported in the log and counts as absent, so that it is computed again.
        """
        entry = self._entry(key)
        return None if entry is None else entry["result"]

    def get_tensors(self, key: str) -> "dict[str, Tensor] | None":
        """Return the tensors kept under `key`; None if there are none or the entry is damaged."""
        entry = self._entry(key)
        if entry is None or "tensors" not in entry:
            return None
        return read_tensors(self._file(key, "safetensors"), sealed=True)

    def put(
        self,
        key: str,
        call: Mapping[str, Any],
        result: Mapping[str, Any],
        tensors: "Mapping[str, Tensor] | None" = None,
    ) -> dict[str, Any]:
        """Keep a result, replacing what was there.

        Returns:
            The result as `get` will return it (tuples have become lists), so that a first run and
            one that starts again go on from the same value.

        Raises:
            StateError: if the key is no file name, or a value is NaN or not JSON.
            DiskError: if the disk refuses.
        """
        path = self._file(key, "json")
        body: dict[str, Any] = {"key": key, "call": dict(call), "result": dict(result)}
        if tensors is not None:
            data = tensors_to_bytes(tensors)
            body["tensors"] = hashlib.sha256(data).hexdigest()
        body = parse_json(json_bytes(body, path), path)
        if tensors is not None:
            write_bytes(self._file(key, "safetensors"), data)
        entry = {**body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()}
        write_bytes(path, json_bytes(entry, path))
        return body["result"]

    def keys(self) -> list[str]:
        """Return the keys of all entries, sorted, whether damaged or not."""
        return sorted(file.stem for file in self.folder.glob("*.json") if file.name[0] != ".")

    def _entry(self, key: str) -> dict[str, Any] | None:
        path = self._file(key, "json")
        if not path.exists():
            return None
        try:
            return self._checked(key, read_json(path))
        except CheckpointError as error:
            log.warning("the entry is computed again because it is damaged: %s", error)
            return None

    def _checked(self, key: str, entry: Any) -> dict[str, Any]:
        path = self._file(key, "json")
        if not isinstance(entry, dict) or not {"key", "call", "result", "sha256"} <= set(entry):
            raise CheckpointError(f"{path} is not a journal entry.")
        body = {name: value for name, value in entry.items() if name != "sha256"}
        if hashlib.sha256(canonical_json(body)).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its SHA-256.")
        if body["key"] != key:
            raise CheckpointError(f"{path} holds the entry {body['key']!r} under another name.")
        if "tensors" in body:
            weights = self._file(key, "safetensors")
            if not weights.is_file():
                raise CheckpointError(f"{weights} is missing.")
            if file_sha256(weights) != body["tensors"]:
                raise CheckpointError(f"{weights} does not match its SHA-256.")
        return body

    def _file(self, key: str, suffix: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", key):
            raise StateError(
                f"journal key {key!r:.120} is not a plain name; use letters, digits, '.', '_', '-'."
            )
        return self.folder / f"{key}.{suffix}"
