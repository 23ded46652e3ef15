"""Load data: read, find columns, check, split off validation, hash."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunepeft.data.columns import find_columns
from prunepeft.data.images import hash_image, read_images
from prunepeft.data.rows import check_columns, read_labels, read_messages, read_texts
from prunepeft.data.sources import read_source
from prunepeft.data.splits import Splits, fingerprint, stratified_order
from prunepeft.data.table import Table
from prunepeft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

Columns = dict[str, list[Any]]  # role -> values of one split


def load_data(
    source: str,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    max_rows: int | None = None,
    offline: bool = False,
) -> Splits:
    """Load and check a data set.

    Args:
        source: A file (jsonl, json, csv, tsv, parquet, txt, npz), a glob, a folder of splits, a
            folder with a folder of images per class, `docstrings` (built in), or a hub id
            `owner/name` or `owner/name:config`. Lines of txt files are running text: validation
            and `max_rows` take consecutive lines.
        task: "seq-cls", "regression", "causal-lm" or "image-cls"; None guesses it from the columns.
        columns: Role -> column, for names that are not usual.
        seed: Of the validation split and of `max_rows`.
        validation_fraction: Share of train to split off if there is no validation split.
        max_rows: Largest number of train rows; a stratified part is taken.
        offline: Never reach for the network; hub data must be in the cache.

    Returns:
        The splits, with labels mapped to 0..n-1 in one order for all of them.

    Raises:
        DataError: if the data cannot be used; the message has the place and what to do.
        ConfigError: if an argument is out of range.
    """
    _check_arguments(source, seed, validation_fraction, max_rows)
    tables, notes = read_source(source, offline=offline)
    task, roles = find_columns(tables["train"], task, columns)
    notes += _drop_unlabelled_test(tables, roles)
    check_columns(tables, roles)
    notes += _note_unused(tables["train"], roles)
    values, labels = _read_values(tables, task, roles, notes)
    order = _make_order(tables["train"], values["train"], labels, seed)
    least = max(2, len(labels or ()))
    if "validation" not in values:
        cut = _find_cut(len(order), least, validation_fraction, source)
        values["validation"] = _take(values["train"], order[cut:])
        notes.append(_note_split(tables["train"], len(order) - cut, seed))
        order = order[:cut]
    n = max(max_rows or len(order), least)
    if n < len(order):
        notes.append(f"train: {n} of {len(order)} rows are used (max_rows)")
    values["train"] = _take(values["train"], order[:n])
    _check_sizes(values, source)
    content = {split: _hash_images(part) for split, part in values.items()}
    notes += _count_shared(content)
    return Splits(
        **{"test": None} | {split: _make_dataset(part, roles) for split, part in values.items()},
        columns={role: column for role, column in roles.items() if role in values["train"]},
        labels=labels,
        task=task,
        source=source,
        fingerprint=fingerprint(task, labels, content),
        notes=tuple(notes),
    )


def load_rows(source: str, *, like: Splits, offline: bool = False) -> "Dataset":
    """Load rows to judge a model on that was trained on other data.

    Args:
        source: As for `load_data`; of several splits test is taken, else validation, else train.
        like: The data of training: columns and classes must be the same.
        offline: Never reach for the network.

    Raises:
        DataError: if columns are missing or a label is none of the known classes.
    """
    tables, _ = read_source(source, offline=offline)
    part = next(split for split in ("test", "validation", "train") if split in tables)
    task, roles = find_columns(tables[part], like.task, like.columns)
    values, _ = _read_values({part: tables[part]}, task, roles, [], like.labels)
    return _make_dataset(values[part], like.columns)


def _check_arguments(
    source: str, seed: int, validation_fraction: float, max_rows: int | None
) -> None:
    if not isinstance(source, str):
        raise ConfigError(
            f"source is {source!r:.60}; give a path, a glob, 'docstrings' or a hub id as text."
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed!r}; allowed are whole numbers from 0 to 4294967295.")
    if not 0 < validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction is {validation_fraction!r}; allowed is a share between 0 and 1."
        )
    if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 2):
        raise ConfigError(f"max_rows is {max_rows!r}; allowed are whole numbers from 2, or none.")


def _drop_unlabelled_test(tables: dict[str, Table], roles: dict[str, str]) -> list[str]:
    """Public test splits often have no labels, or only -1: then there is nothing to report on."""
    if "test" not in tables or "label" not in roles:
        return []
    column, table = roles["label"], tables["test"]
    if column in table.columns and any(
        row[column] not in (None, -1, "", "-1") for row in table.rows
    ):
        return []
    del tables["test"]
    return ["the test split has no labels and is left out"]


def _read_values(
    tables: dict[str, Table],
    task: str,
    roles: dict[str, str],
    notes: list[str],
    known: tuple[str, ...] | None = None,
) -> tuple[dict[str, Columns], tuple[str, ...] | None]:
    """Checked values, split -> role -> list, and the class names (`known` if given)."""
    labels = None
    by_split, values = {}, {}
    if "label" in roles:
        by_split, labels = read_labels(tables, roles["label"], task, known)
        if task == "regression" and "train" in by_split:
            notes += _check_scores(by_split["train"], roles["label"], tables["train"])
    for split, table in tables.items():
        part: Columns = {}
        for role, column in roles.items():
            if role == "label":
                part[role] = by_split[split]
            elif role == "messages":
                part[role] = read_messages(table, column)
            elif role == "image":
                part[role] = read_images(table, column)
            else:
                part[role] = read_texts(table, role, column)
        if "image" not in part:
            _check_not_empty(part, split, table, notes)
        if "prompt_input" in part:
            pairs = zip(part["prompt"], part.pop("prompt_input"), strict=True)
            part["prompt"] = [
                f"{prompt}\n\n{extra}" if extra.strip() else prompt for prompt, extra in pairs
            ]
        values[split] = part
    return values, labels


def _check_scores(scores: list[float], column: str, table: Table) -> list[str]:
    if len(set(scores)) < 2:
        raise DataError(
            f"{table.places[0][0]}: all labels (column {column!r}) are {scores[0]}; "
            "regression needs different values. Check the column."
        )
    if all(score.is_integer() for score in scores) and len(set(scores)) <= 20:
        return ["labels are whole numbers; set task to seq-cls if they are classes"]
    return []


def _check_not_empty(part: Columns, split: str, table: Table, notes: list[str]) -> None:
    role = next(name for name in ("messages", "completion", "text") if name in part)
    roles = [name for name in (role, "text_pair") if name in part]
    empty = sum(
        not any(_has_text(value) for value in row)
        for row in zip(*(part[r] for r in roles), strict=True)
    )
    if empty == len(table.rows):
        raise DataError(
            f"{table.places[0][0]}: every text of the {split} split is empty; name another column."
        )
    if empty:
        notes.append(f"{empty} of {len(table.rows)} {split} rows have an empty text")


def _has_text(value: Any) -> bool:
    return (
        bool(value.strip())
        if isinstance(value, str)
        else any(turn["content"].strip() for turn in value)
    )


def _count(part: Columns) -> int:
    return len(next(iter(part.values())))


def _take(part: Columns, rows: list[int]) -> Columns:
    rows = sorted(rows)
    return {role: [values[row] for row in rows] for role, values in part.items()}


def _make_order(
    table: Table, train: Columns, labels: tuple[str, ...] | None, seed: int
) -> list[int]:
    """Order that starts with train and ends with validation; running text stays as it is."""
    if table.running:
        return list(range(len(table.rows)))
    return stratified_order(train["label"] if labels else [0] * len(table.rows), seed)


def _note_unused(table: Table, roles: dict[str, str]) -> list[str]:
    unused = [name for name in table.columns if name not in roles.values()]
    return [f"columns not used: {', '.join(unused)}"] if unused else []


def _find_cut(n: int, least: int, fraction: float, source: str) -> int:
    """Number of rows that stay in train; the rest is validation."""
    size = max(2, round(n * fraction))
    if n - size < least:
        raise DataError(
            f"{source}: {n} rows are too few to split off {size} for validation and leave at least "
            f"{least} to train on; add rows, or lower validation_fraction ({fraction})."
        )
    return n - size


def _note_split(table: Table, n_rows: int, seed: int) -> str:
    how = "the last rows" if table.running else f"split off with seed {seed}"
    return f"validation: {n_rows} rows of train, {how}"


def _check_sizes(values: dict[str, Columns], source: str) -> None:
    for split, part in values.items():
        if _count(part) < 2:
            raise DataError(
                f"{source}: the {split} split has 1 row; at least 2 are needed. Add rows."
            )


def _hash_images(part: Columns) -> Columns:
    """The values with every image as the hash of its content, wherever the file lies."""
    return {
        role: [hash_image(value) for value in values] if role == "image" else values
        for role, values in part.items()
    }


def _count_shared(values: dict[str, Columns]) -> list[str]:
    def keys(part: Columns) -> list[str]:
        return [
            repr(row)
            for row in zip(*(part[role] for role in sorted(part) if role != "label"), strict=True)
        ]

    train = set(keys(values["train"]))
    shared = sum(key in train for key in keys(values["validation"]))
    what = "image" if "image" in values["train"] else "text"
    return [f"{shared} validation rows have the same {what} as a train row"] if shared else []


def _make_dataset(part: Columns, roles: dict[str, str]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({roles[role]: values for role, values in part.items()})
