"""Data of the suite: rows to train on, rows to tune compression on, rows to judge on."""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

VALIDATION = ("validation", "valid")


def prepare(source: Path, place: Path, settings: Mapping[str, Any], seed: int) -> tuple[Path, Path]:
    """Write a folder of splits and a file of rows that are in neither split; made once.

    Args:
        source: Folder with `train` and `validation` (or `valid`), jsonl or txt.
        place: Where the folder goes.
        settings: `rows`, `tune_rows` and perhaps `validation_rows`.
        seed: Which training rows are taken.
    Returns:
        The folder of splits, and the file of rows for tuning.
    """
    train, *_ = (f for f in (source / "train.jsonl", source / "train.txt") if f.is_file())
    names = (source / f"{name}{train.suffix}" for name in VALIDATION)
    (validation, *_) = (file for file in names if file.is_file())
    rows, wanted = _lines(train), settings["rows"] + settings["tune_rows"]
    chosen = random.Random(seed).sample(range(len(rows)), wanted)
    splits, tune = place / "splits", place / f"tune{train.suffix}"
    parts = {
        splits / train.name: [rows[i] for i in chosen[: settings["rows"]]],
        splits / f"validation{train.suffix}": _lines(validation)[: settings.get("validation_rows")],
        tune: [rows[i] for i in chosen[settings["rows"] :]],
    }
    for file, lines in parts.items():
        _write(file, lines)
    return splits, tune


def _lines(file: Path) -> Sequence[str]:
    return list(_kept(file)) if file.suffix == ".jsonl" else _text(file)


def _kept(file: Path) -> Iterator[str]:
    """Rows with their texts and their label alone."""
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        yield json.dumps({k: v for k, v in row.items() if k.startswith("sentence") or k == "label"})


def _text(file: Path) -> Sequence[str]:
    return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def _write(file: Path, lines: Sequence[str]) -> None:
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}-{os.getpid()}.part")  # several processes may be at it
    part.write_text("\n".join(lines) + "\n", "utf-8")
    part.replace(file)
