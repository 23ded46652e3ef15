"""The result of loading data, and the seeded ways to take part of it."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prunepeft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


# Name of a file or folder -> the split it stands for.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Splits:
    """Checked data of one task.

    Args:
        train: Rows to train on; columns are those in `columns`, labels are ready to use.
        validation: Rows to select on.
        test: Rows to report on, never to select on; None if there are none with labels.
        columns: Role (text, text_pair, image, label, prompt, completion, messages) -> column.
        labels: Class names by label number, None if there are no classes.
        task: Name of the task, guessed or given.
        source: What the user named.
        fingerprint: SHA-256 of the content, the same wherever the files lie.
        notes: Things worth telling the user, one sentence each.
    """

    train: "Dataset"
    validation: "Dataset"
    test: "Dataset | None"
    columns: dict[str, str]
    labels: tuple[str, ...] | None
    task: str
    source: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    @cached_property
    def n_classes(self) -> int:
        """Classes among the training rows; 1 if there are none."""
        return 1 if self.labels is None else len(set(self.train[self.columns["label"]]))


def stratified_order(labels: Sequence[Any], seed: int) -> list[int]:
    """Order row numbers so that every beginning of the order has the class shares of the whole.

    Row j of class c (shuffled inside the class, n_c rows) gets the key (j + 1/2) / n_c, the first
    of each class the key 0; rows are sorted by key. So the first rows are one of each class, and a
    smaller part is contained in a larger one.

    Example:
        >>> order = stratified_order([0, 0, 0, 1, 1, 1], seed=0)
        >>> sorted([0, 0, 0, 1, 1, 1][i] for i in order[:4])
        [0, 0, 1, 1]
    """
    generator = random.Random(seed)
    members: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    keyed = []
    for rank, label in enumerate(sorted(members)):
        rows = members[label]
        generator.shuffle(rows)
        keyed += [((j + 0.5) / len(rows) if j else 0.0, rank, row) for j, row in enumerate(rows)]
    return [row for _, _, row in sorted(keyed)]


def pick(labels: Sequence[Any], size: float | int, seed: int) -> list[int]:
    """Rows of a seeded part, ascending; at least one a class.

    Args:
        labels: One label per row to stratify by; all equal for a plain sample.
        size: Share of the rows in (0, 1] if a float, number of rows if an int.
        seed: Of the shuffle.

    Raises:
        ConfigError: if `size` is not positive, or a float above 1.
    """
    if isinstance(size, bool) or not (0 < size <= 1 if isinstance(size, float) else size >= 1):
        raise ConfigError(
            f"size of a part of the data is {size!r}; allowed are a share in (0, 1] or a "
            f"whole number from 1."
        )
    count = round(size * len(labels)) if isinstance(size, float) else min(size, len(labels))
    count = max(count, len(set(labels)), min(1, len(labels)))
    return sorted(stratified_order(labels, seed)[:count])


def subset(
    dataset: "Dataset", size: float | int, seed: int = 0, label: str | None = None
) -> "Dataset":
    """Take a seeded part of a data set, in the order of the whole.

    Args:
        dataset: Rows.
        size: Share in (0, 1] if a float, number of rows if an int.
        seed: Same seed, same part; a smaller part is contained in a larger one.
        label: Column whose class shares are kept, with at least one row a class.

    Raises:
        ConfigError: if `size` is out of range or the column is not there.
    """
    if label is not None and label not in dataset.column_names:
        raise ConfigError(
            f"no column {label!r} to stratify by; columns are {', '.join(dataset.column_names)}."
        )
    labels = list(dataset[label]) if label else [0] * len(dataset)
    rows = pick(labels, size, seed)
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def fingerprint(
    task: str, labels: tuple[str, ...] | None, splits: Mapping[str, Mapping[str, Sequence[Any]]]
) -> str:
    """Hash the content: task, class names, and for every split the values by role.

    Args:
        task: Task name.
        labels: Class names or None.
        splits: Split -> role -> values, images as hashes. Paths and column names do not enter.
    """
    digest = hashlib.sha256(json.dumps([task, labels]).encode())
    for split in sorted(splits):
        roles = sorted(splits[split])
        digest.update(json.dumps([split, roles]).encode())
        for values in zip(*(splits[split][role] for role in roles), strict=True):
            digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()
