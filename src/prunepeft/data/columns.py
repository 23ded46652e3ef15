"""Find which column plays which part, and guess the task from that."""

from collections.abc import Mapping
from typing import Any

from prunepeft.data.table import Table
from prunepeft.errors import ConfigError, DataError, UnknownNameError
from prunepeft.registry import unknown_name

TASK_NAMES = ("seq-cls", "regression", "causal-lm", "image-cls")
ROLES = (
    "text",
    "text_pair",
    "image",
    "label",
    "prompt",
    "prompt_input",
    "completion",
    "messages",
)
LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "intent",
    "sentiment",
    "score",
    "rating",
    "relatedness",
)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXTS = (
    "sentence",
    "text",
    "review",
    "content",
    "document",
    "comment",
    "tweet",
    "utterance",
    "question",
    "query",
)
IMAGES = ("image", "img", "image_path", "image_file", "file_name")
MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
ROLES_OF_TASK = {
    "seq-cls": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "causal-lm": ("messages", "prompt", "prompt_input", "completion", "text"),
    "image-cls": ("image", "label"),
}


def find_columns(
    table: Table, task: str | None, named: Mapping[str, str] | None
) -> tuple[str, dict[str, str]]:
    """Guess the task, and the column of each role, from the train split.

    Args:
        table: The train split.
        task: Name of the task, or None to guess it.
        named: Role to column, as the user says; overrides what would be detected.

    Returns:
        Task name and role -> column.

    Raises:
        ConfigError: if a task or role name is unknown.
        DataError: if a named column is missing or no usual name is found.
    """
    named = dict(named or {})
    _check_named(table, task, named)
    found = {} if "messages" in named else _detect(table, task, named)
    roles = {role: (named | found | named)[role] for role in ROLES if role in named | found}
    task = task or _guess_task(table, roles)
    for role in named:
        if role not in ROLES_OF_TASK[task]:
            allowed = ", ".join(ROLES_OF_TASK[task])
            raise ConfigError(
                f"columns: task {task} does not use the role {role!r}; it uses {allowed}. "
                f"Leave it out."
            )
    roles = {role: column for role, column in roles.items() if role in ROLES_OF_TASK[task]}
    _check_complete(table, task, roles)
    return task, roles


def _check_named(table: Table, task: str | None, named: dict[str, str]) -> None:
    if task is not None and task not in TASK_NAMES:
        raise UnknownNameError(unknown_name("task", task, TASK_NAMES))
    for role, column in named.items():
        if role not in ROLES:
            raise ConfigError(f"columns: {unknown_name('role', role, ROLES)}")
        if column not in table.columns:
            raise DataError(
                f"{table.places[0][0]}: {unknown_name('column', column, table.columns)}"
            )
    if len(set(named.values())) < len(named):
        raise ConfigError(
            f"columns: two roles name the same column ({named}); name a different one for each."
        )


def _detect(table: Table, task: str | None, named: dict[str, str]) -> dict[str, str]:
    """Roles by usual names among the columns that the user has not named."""
    free = {name.lower(): name for name in table.columns if name not in named.values()}
    found: dict[str, str] = {}
    if task != "causal-lm" and "label" not in named:
        label = next((name for name in LABELS if name in free), None)
        if label:
            found["label"] = free.pop(label)
    has_label = "label" in found or "label" in named
    if not has_label or task == "causal-lm":
        found |= _detect_language_model(free, named)
    if not {"messages", "prompt", "completion"} & set(found | named):
        found |= _detect_texts(free, named)
    if task == "image-cls" or not {"messages", "prompt", "text"} & set(found | named):
        image = next((name for name in IMAGES if name in free), None)
        found |= {"image": free[image]} if image else {}
    return found


def _detect_language_model(free: dict[str, str], named: dict[str, str]) -> dict[str, str]:
    if "text" in named:
        return {}
    message = next((name for name in MESSAGES if name in free), None)
    if message and "prompt" not in named:
        return {"messages": free[message]}
    pair = {role: named[role] for role in ("prompt", "completion") if role in named}
    for prompt, completion in () if len(pair) == 2 else PROMPTS:
        if prompt in free and completion in free:
            pair = {"prompt": free[prompt], "completion": free[completion]}
            break
    if pair.get("prompt", "").lower() == "instruction" and "input" in free:
        pair["prompt_input"] = free["input"]
    return pair


def _detect_texts(free: dict[str, str], named: dict[str, str]) -> dict[str, str]:
    if "text" in named:
        return {}
    for first, second in PAIRS:
        if first in free and second in free:
            return {"text": free[first], "text_pair": free[second]}
    text = next((name for name in TEXTS if name in free), None)
    if text is None and {"prompt", "completion"} <= set(free):
        return {"text": free["prompt"], "text_pair": free["completion"]}
    return {"text": free[text]} if text else {}


def _guess_task(table: Table, roles: dict[str, str]) -> str:
    if "image" in roles:
        return "image-cls"
    if "label" not in roles:
        return "causal-lm"
    values = [row[roles["label"]] for row in table.rows]
    if table.untyped:
        values = parse_numbers(values)
    return "regression" if any(isinstance(value, float) for value in values) else "seq-cls"


def _check_complete(table: Table, task: str, roles: dict[str, str]) -> None:
    place, columns = table.places[0][0], ", ".join(table.columns)
    if task == "causal-lm":
        ways = ({"text"}, {"messages"}, {"prompt", "completion"})
        if not any(way <= set(roles) for way in ways):
            raise DataError(
                f"{place}: no column for the text was recognised (columns: {columns}). Name "
                f"them, for example "
                "columns={'text': ...}, {'prompt': ..., 'completion': ...} or {'messages': ...}."
            )
        return
    if "choices" in table.columns and "choices" not in roles.values():
        raise DataError(
            f"{place}: the column 'choices' looks like multiple choice, which is not a known task "
            f"({', '.join(TASK_NAMES)}). Rewrite it as prompt and completion, or remove the column."
        )
    for role in ("image" if task == "image-cls" else "text", "label"):
        if role not in roles:
            raise DataError(
                f"{place}: no column for the {role} was recognised (columns: {columns}), and "
                f"task {task} needs "
                f"one. Name it with columns={{'{role}': '<column>'}}"
                + (", or add a header line." if table.untyped else ".")
            )


def parse_numbers(values: list[Any]) -> list[Any]:
    """Turn strings into ints if all of them are, else into floats if all are, else leave them.

    Example:
        >>> parse_numbers(["1", "0"]), parse_numbers(["1", "0.5"]), parse_numbers(["1", "no"])
        ([1, 0], [1.0, 0.5], ['1', 'no'])
    """
    if any("_" in value for value in values if value):
        return values
    for kind in (int, float):
        try:
            numbers = [
                None if value is None or not value.strip() else kind(value) for value in values
            ]
        except ValueError:
            continue
        if any(number is not None and number == number for number in numbers):
            return numbers
    return values
