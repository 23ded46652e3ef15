"""Check every value that is used and bring it into one form; a bad one is named by its place."""

import math
from typing import Any

from prunepeft.data.columns import parse_numbers
from prunepeft.data.table import Table
from prunepeft.errors import DataError

Tables = dict[str, Table]
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def check_columns(tables: Tables, roles: dict[str, str]) -> None:
    """Raise DataError if a split lacks a column that the train split has."""
    for split, table in tables.items():
        missing = [column for column in roles.values() if column not in table.columns]
        if missing:
            raise DataError(
                f"{table.places[0][0]}: the {split} split has no column {missing[0]!r} "
                f"(columns: {', '.join(table.columns)}); all splits need the same columns."
            )


def read_texts(table: Table, role: str, column: str) -> list[str]:
    """Values of a text column, every one a string that can be written as UTF-8.

    Raises:
        DataError: with the place of the first value that is none.
    """
    texts = []
    for index, row in enumerate(table.rows):
        value = row[column]
        if value is None and role == "prompt_input":
            value = ""
        texts.append(_check_text(value, f"{table.where(index)}, column {column!r}"))
    return texts


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        what = "no value" if value is None else f"a {type(value).__name__}"
        nested = (
            " (nested columns must be flattened first)" if isinstance(value, list | dict) else ""
        )
        raise DataError(
            f"{where}: text is needed, received {what}{nested}. Fix the row or name another column."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text holds half of a surrogate pair; save it as valid Unicode."
        ) from error
    return value


def read_messages(table: Table, column: str) -> list[list[dict[str, str]]]:
    """Chats as lists of {"role", "content"}; the form {"from", "value"} is translated.

    Raises:
        DataError: with the place of the first chat that is malformed.
    """
    return [
        _check_chat(row[column], f"{table.where(i)}, column {column!r}")
        for i, row in enumerate(table.rows)
    ]


def _check_chat(chat: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(chat, list) or not chat:
        raise DataError(
            f"{where}: a chat must be a list of messages such as "
            f'[{{"role": "user", "content": "..."}}], received {type(chat).__name__}. Fix the row.'
        )
    messages = []
    for turn in chat:
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: a message must be an object with role and content, received "
                f"{turn!r:.60}."
            )
        role = turn.get("role") or turn.get("from")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        if not isinstance(role, str):
            raise DataError(
                f"{where}: a message has no role (it needs user, assistant or system). Fix the row."
            )
        messages.append({"role": SPEAKERS.get(role, role), "content": _check_text(content, where)})
    return messages


def read_labels(
    tables: Tables, column: str, task: str, known: tuple[str, ...] | None = None
) -> tuple[dict[str, list[Any]], tuple[str, ...] | None]:
    """Labels of all splits in the form the task trains on.

    Args:
        tables: Split -> table.
        column: The label column.
        task: "regression" (labels become floats), else they become 0..n-1.
        known: Class names by number; by default those of the train split, sorted.

    Returns:
        Labels by split, and the class names (None for regression).

    Raises:
        DataError: for absent, mixed, negative, non-finite or unseen labels, and for a single class.
    """
    raw = {split: [row[column] for row in table.rows] for split, table in tables.items()}
    if any(table.untyped for table in tables.values()):
        flat = iter(parse_numbers([value for values in raw.values() for value in values]))
        raw = {split: [next(flat) for _ in values] for split, values in raw.items()}
    for split, values in raw.items():
        _check_present(tables[split], values, column)
    if task == "regression":
        return {
            split: _check_scores(tables[split], values, column) for split, values in raw.items()
        }, None
    values = {split: _check_classes(tables[split], labels, column) for split, labels in raw.items()}
    kinds = {isinstance(value, str) for labels in values.values() for value in labels}
    if len(kinds) > 1:
        raise DataError(
            f"the labels (column {column!r}) mix text and numbers; write all of them in one form."
        )
    if known is None:
        classes = _find_classes(tables["train"], values["train"], column)
        known = tuple(_class_name(tables["train"], value) for value in classes)
    return {
        split: _number(tables[split], labels, known, split) for split, labels in values.items()
    }, known


def _check_present(table: Table, values: list[Any], column: str) -> None:
    for index, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(
                f"{table.where(index)}: the label (column {column!r}) is absent. Every row "
                f"needs one: "
                "fill it in, remove the row, or name another column."
            )
        if not isinstance(value, str | int | float):
            raise DataError(
                f"{table.where(index)}: the label (column {column!r}) is a "
                f"{type(value).__name__}; allowed are "
                "text and numbers, one per row (labels per token and several labels are not "
                "supported)."
            )


def _check_scores(table: Table, values: list[Any], column: str) -> list[float]:
    scores = []
    for index, value in enumerate(values):
        try:
            score = float("nan") if isinstance(value, str) else float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score) or abs(score) > 3e38:
            raise DataError(
                f"{table.where(index)}: regression needs a finite number as label, received "
                f"{value!r:.60} "
                f"(column {column!r}). Fix the row, or set task to seq-cls if labels are classes."
            )
        scores.append(score)
    return scores


def _find_classes(table: Table, values: list[Any], column: str) -> list[Any]:
    """The classes of the train split in order."""
    classes = sorted(set(values))
    if len(classes) < 2:
        raise DataError(
            f"{table.places[0][0]}: all {len(values)} rows have the label {classes[0]!r}; "
            "classification needs at least two classes. Check the column, or add rows of "
            "another class."
        )
    if len(values) >= 20 and len(classes) > len(values) / 2:
        raise DataError(
            f"column {column!r} holds {len(classes)} different labels in {len(values)} rows: "
            f"it looks "
            "like free text or an identifier, not classes. Name the label column, or set "
            "task to regression."
        )
    return classes


def _class_name(table: Table, value: Any) -> str:
    names = table.label_names
    return names[value] if names and isinstance(value, int) and value < len(names) else str(value)


def _number(table: Table, values: list[Any], known: tuple[str, ...], split: str) -> list[int]:
    """Numbers of the classes, by name."""
    index = {name: number for number, name in enumerate(known)}
    numbers = []
    for row, value in enumerate(values):
        name = _class_name(table, value)
        if name not in index:
            raise DataError(
                f"{table.where(row)}: label {value!r:.60} of the {split} split is none of "
                f"the classes to train on "
                f"({', '.join(known[:8])}{', ...' if len(known) > 8 else ''}); add rows of "
                f"that class to the "
                "train split, or remove the row."
            )
        numbers.append(index[name])
    return numbers


def _check_classes(table: Table, labels: list[Any], column: str) -> list[Any]:
    """Labels as text, bools or whole numbers from 0."""
    checked = []
    for index, value in enumerate(labels):
        if isinstance(value, float):
            if not value.is_integer():
                raise DataError(
                    f"{table.where(index)}: label {value!r} is no class; classes are text or "
                    f"whole numbers. "
                    "Set task to regression, or fix the row."
                )
            value = int(value)
        if isinstance(value, int) and value < 0:
            raise DataError(
                f"{table.where(index)}: label {value} (column {column!r}) is out of range; "
                f"classes are counted "
                "from 0, and -1 usually marks a row without a label. Remove such rows."
            )
        checked.append(_check_text(value, table.where(index)) if isinstance(value, str) else value)
    return checked
