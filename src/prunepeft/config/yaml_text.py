"""A small, safe part of YAML: maps, lists and plain text.

Tags, anchors and aliases, repeated keys, deep nesting and large files are refused. No number or
switch is guessed here: `1e-4`, `no` and `007` stay text, and the field they belong to reads them.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from prunepeft.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 12
MAX_EVENTS = 50_000
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a configuration file into maps, lists, text and None.

    Raises:
        ConfigError: if it cannot be read or uses what is refused here.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; give the path of a YAML file.")
        if size > MAX_BYTES:
            raise ConfigError(
                f"{file} has {size:,} bytes; a configuration may have at most {MAX_BYTES:,}."
            )
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {file}; write one with `prunepeft init --task seq-cls > {file}`."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    value = parse_yaml(text, str(file))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold `key: value` lines; it holds a {_type(value)}.")
    return value


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; `source` names it in messages.

    Example:
        >>> parse_yaml("train: {lr: 1e-4, note: no}", "text")
        {'train': {'lr': '1e-4', 'note': 'no'}}
    """
    try:
        _refuse_unsafe(text, source)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}.") from None
    return None if node is None else _value(node, source)


def _refuse_unsafe(text: str, source: str) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        depth += isinstance(event, _OPENING) - isinstance(event, _CLOSING)
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise ConfigError(
                f"{source}, line {line}: too deep or too long for a configuration "
                f"(at most {MAX_DEPTH} levels and {MAX_EVENTS:,} entries)."
            )
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(
                f"{source}, line {line}: anchors (&) and aliases (*) are not allowed; "
                "write the value out, in quotes if it begins with & or *."
            )
        if getattr(event, "tag", None):
            raise ConfigError(
                f"{source}, line {line}: the tag {event.tag!r} is not allowed; "
                "a configuration holds maps, lists, text and numbers only."
            )


def _value(node: yaml.Node, source: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        is_null = not node.style and node.value.lower() in ("", "~", "null")
        return None if is_null else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, source) for item in node.value]
    result: dict[str, Any] = {}
    for key, item in node.value:
        where = f"{source}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be text, not a list or map.")
        if key.value in result:
            raise ConfigError(f"{where}: the key {key.value!r} is given twice; keep one of them.")
        result[key.value] = _value(item, source)
    return result


def _type(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
