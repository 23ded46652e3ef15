"""The configuration explained: a commented YAML file to start from, and its JSON schema."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prunepeft.config.model import RunConfig
from prunepeft.config.names import check_name

_START: dict[str, dict[str, str]] = {
    "seq-cls": {
        "data": "train.jsonl",
        "columns": "{text: text, label: label}",
    },
    "regression": {
        "data": "train.csv",
        "columns": "{text: sentence1, text_pair: sentence2, label: score}",
    },
    "causal-lm": {
        "data": "train.jsonl",
        "columns": "{prompt: prompt, completion: completion}",
        "kinds": "[lora]",
        "train.lr": "2e-4",
        "train.batch_size": "8",
        "train.max_length": "512",
    },
    "image-cls": {
        "data": "images",
    },
}
_SHOWN = ("model", "data", "budget", "task", "columns", "kinds", "seed", "baseline")
_SHOWN += ("train.epochs", "train.lr")


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    schema["properties"].pop("trust_remote_code")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def template(task: str) -> str:
    """A commented YAML file for a task; what is commented out shows the default.

    Raises:
        UnknownNameError: if the task is unknown.
    """
    start = {
        "model": "path/or/hub-id",
        "budget": "0.5%",
        "task": check_name("task", task),
        "baseline": "lora",
        **_START.get(task, {"data": "train.jsonl"}),
    }
    lines = [
        f"# prunepeft, task {task}. See what would run:  prunepeft check run.yaml",
        "# Then:  prunepeft search run.yaml   The same command again resumes.",
        "# A line behind # shows a default; any key is also key=value on the command line.",
        "",
        *_lines(RunConfig, "", start),
    ]
    return "\n".join(lines) + "\n"


def _lines(model: type[BaseModel], prefix: str, start: dict[str, str]) -> list[str]:
    indent = "  " if prefix else ""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            group = _lines(field.annotation, f"{name}.", start)
            is_empty = all(line.lstrip().startswith("#") for line in group)
            lines += ["", f"# {name}:" if is_empty else f"{name}:", *group]
            continue
        key = prefix + name
        is_set = key in start or key in _SHOWN
        value = start.get(key, _text(field))
        is_set = is_set and value != "null"
        entry = f"{indent}{'' if is_set else '# '}{name}: {value}"
        lines.append(f"{entry:<44}  # {field.description}")
    return lines


def _text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
