"""What a compressed file says about itself: written as JSON, read back with every field checked."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prunepeft.compression.adapter import SCOPES, Entry, Settings
from prunepeft.compression.codecs import CODECS, Encoded
from prunepeft.compression.compeft import METHODS
from prunepeft.compression.starts import STARTS
from prunepeft.errors import CheckpointError

VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def make_header(
    settings: Settings,
    encoded: list[Encoded],
    scales: list[float],
    entries: tuple[Entry, ...],
    start_check: list[float] | None,
) -> dict[str, Any]:
    """The header of these vectors."""
    return {
        "version": VERSION,
        "settings": asdict(settings),
        "groups": [
            [e.codec, e.size, e.n_kept, e.low_bits, scale]
            for e, scale in zip(encoded, scales, strict=True)
        ],
        "tensors": [
            [e.name, str(e.dtype).removeprefix("torch."), list(e.shape), e.group, e.start]
            for e in entries
        ],
        "start_check": start_check,
    }


class Header:
    """A header read from a file that may come from anyone.

    Attributes:
        settings: How it was compressed.
        groups: (codec, size, n_kept, low_bits, scale) of every vector.
        entries: The compressed tensors.
        start_check: See `CompressedAdapter`.
    """

    def __init__(self, data: Any, file: Path) -> None:
        self._file = file
        fields = ("version", "settings", "groups", "tensors", "start_check")
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise self._damaged(
                f"its version is {version!r:.40} and this prunepeft reads {VERSION}"
            )
        if set(data) != set(fields):
            raise self._damaged(f"its header must hold {', '.join(fields)}")
        self.settings = self._settings(data["settings"])
        self.groups = [self._group(row) for row in self._rows(data["groups"], 5)]
        self.entries = tuple(self._entry(row) for row in self._rows(data["tensors"], 5))
        self.start_check = self._check(data["start_check"])
        self._check_sizes()

    def _settings(self, data: Any) -> Settings:
        defaults = asdict(Settings())
        if not isinstance(data, dict) or set(data) != set(defaults):
            raise self._damaged("its settings are incomplete")
        alike = all(isinstance(data[k], type(v)) for k, v in defaults.items() if k != "alpha")
        known = data["method"] in METHODS and data["scope"] in SCOPES
        if not alike or not known or not 0 < data["density"] <= 1 or not _finite(data["alpha"]):
            raise self._damaged("a setting has a value that is not allowed")
        return Settings(**{**data, "alpha": float(data["alpha"])})

    def _group(self, row: list[Any]) -> tuple[str, int, int, int, float]:
        codec, size, n_kept, low_bits, scale = row
        if codec not in CODECS or not all(_whole(n) for n in (size, n_kept, low_bits)):
            raise self._damaged(f"the vector {row!r:.80} is not described")
        if not _finite(scale):
            raise self._damaged(f"a scale is {scale!r:.40}")
        return codec, size, n_kept, low_bits, float(scale)

    def _entry(self, row: list[Any]) -> Entry:
        name, dtype, shape, group, start = row
        sound = isinstance(name, str) and 0 < len(name) <= 1000 and name.isprintable()
        sound = sound and isinstance(dtype, str) and dtype in DTYPES and start in STARTS
        sound = sound and isinstance(shape, list) and len(shape) <= 8 and all(map(_whole, shape))
        if not sound or not _whole(group) or group >= len(self.groups):
            raise self._damaged(f"the tensor {row!r:.120} is not described")
        return Entry(name, tuple(shape), DTYPES[dtype], group, start)

    def _check(self, value: Any) -> list[float] | None:
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(map(_finite, value)):
            raise self._damaged("the check of its starting values is no pair of numbers")
        return [float(number) for number in value]

    def _check_sizes(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names or names != sorted(set(names)):
            raise self._damaged("its tensors are missing, twice there or out of order")
        sizes = [0] * len(self.groups)
        for entry in self.entries:
            sizes[entry.group] += math.prod(entry.shape)
        if sizes != [group[1] for group in self.groups]:
            raise self._damaged("its tensors do not fill its vectors")

    def _rows(self, value: Any, width: int) -> list[list[Any]]:
        if not isinstance(value, list) or len(value) > 1_000_000:
            raise self._damaged("a list is missing")
        if not all(isinstance(row, list) and len(row) == width for row in value):
            raise self._damaged("a list has rows of the wrong length")
        return value

    def _damaged(self, reason: str) -> CheckpointError:
        return damaged(self._file, reason)


def damaged(file: Path, reason: str) -> CheckpointError:
    """The error for a file that cannot be used."""
    return CheckpointError(
        f"{file} is not a usable compressed adapter: {reason}. Restore it from a copy, or "
        "compress the adapter again."
    )


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30
