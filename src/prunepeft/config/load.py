"""File, then overrides, then flags: later ones win. Every mistake becomes one sentence."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from prunepeft.config.model import RunConfig
from prunepeft.config.yaml_text import parse_yaml, read_yaml
from prunepeft.errors import ConfigError, PrunePeftError

_SWITCHED = ("ist",)  # groups that `name=on` switches on
_MEANT = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "list_": "a list, e.g. [a, b] or a,b",
    "dict_": "a group of `name: value` entries, e.g. {name: value}",
    "model_": "a group of `name: value` entries, e.g. {name: value}",
}


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Resolve a configuration.

    Args:
        path: YAML file, or None.
        overrides: `key.sub=value` texts; they beat the file.
        flags: Dotted key -> value; they beat both. None values count as not given.
    Raises:
        ConfigError: for an unknown key, a wrong value or an unreadable file.
        BudgetError: for a budget that cannot be met by any model.
    Example:
        >>> load_config(flags={"model": "m", "data": "d", "budget": "1%"}).train.epochs
        3
    """
    settings: dict[str, Any] = {} if path is None else read_yaml(path)
    source = "the command line" if path is None else str(path)
    if "trust_remote_code" in settings:
        raise ConfigError(
            f"{source}: trust_remote_code is not read from files, because they may come from "
            "others; give --trust-remote-code on the command line if you trust the model's code."
        )
    for name in _SWITCHED:
        if not isinstance(settings.get(name, {}), dict):
            settings[name] = {"enabled": settings[name]}
    for text in overrides:
        key, value = parse_override(text)
        _put(settings, key, value, text)
    for key, value in (flags or {}).items():
        if value is not None:
            _put(settings, key, value, f"--{key}")
    return validated(settings)


def validated(settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with these settings. Raises ConfigError or BudgetError in one sentence."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise _sentence(error, settings) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; lists and maps are read as YAML, everything else stays text.

    Example:
        >>> parse_override("sizes.lora=[4, 8]"), parse_override("train.max_length=null")
        (('sizes.lora', ['4', '8']), ('train.max_length', None))
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError(f"{text!r} is not of the form key=value, e.g. train.epochs=3.")
    if key == "trust_remote_code":
        raise ConfigError("trust_remote_code is a flag: give --trust-remote-code instead.")
    if value[:1] in ("[", "{", '"', "'"):
        return key, parse_yaml(value, f"override {key}")
    return key, None if value.lower() in ("", "~", "null") else value


def key_paths(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration."""
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_paths(field.annotation, f"{prefix}{name}.")


def _put(settings: dict[str, Any], key: str, value: Any, text: str) -> None:
    *parents, leaf = key.split(".")
    place = settings
    for done, name in enumerate(parents, 1):
        inner = place.get(name)
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{text!r} cannot be set: {'.'.join(parents[:done])} is {inner!r}, not a group."
            )
        place = inner
    if not parents and leaf in _SWITCHED and not isinstance(value, Mapping):
        place = place.setdefault(leaf, {})  # ist=on, perhaps after ist.beta=0
        leaf = "enabled"
    place[leaf] = value


def _sentence(error: ValidationError, settings: Mapping[str, Any]) -> PrunePeftError:
    """One error of ours for what pydantic found; the first few mistakes in one paragraph."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    own = (detail.get("ctx", {}).get("error") for detail in details[:1])
    cause = next((e for e in own if isinstance(e, PrunePeftError)), None)
    texts = [_describe(detail) for detail in details]
    more = f" ({len(texts) - 3} more mistakes follow.)" if len(texts) > 3 else ""
    kind = type(cause) if cause else ConfigError
    return kind(" ".join(dict.fromkeys(texts[:3])) + more)


def _describe(detail: Any) -> str:
    path = _path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path)
    if detail["type"] == "missing":
        return f"{path} is missing; give --{path} or {path}=... ({_help(path)})."
    own = detail.get("ctx", {}).get("error")
    reason = str(own) if isinstance(own, PrunePeftError) else _allowed(detail)
    if not path:
        return _full_stop(reason)
    received = "null" if detail["input"] is None else repr(detail["input"])
    if isinstance(own, PrunePeftError) and received in reason:
        return _full_stop(f"{path}: {reason}")
    return _full_stop(f"{path} got {_short(received)}: {reason}")


def _allowed(detail: Any) -> str:
    meant = next((text for start, text in _MEANT.items() if detail["type"].startswith(start)), None)
    if meant:
        return f"it must be {meant}"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return message.replace("input should be", "it must be")


def _unknown_key(path: str) -> str:
    known = list(key_paths())
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    if not close:
        near = difflib.get_close_matches(path.rpartition(".")[2], list(leaves), n=1, cutoff=0.75)
        close = [leaves[name] for name in near]
    if close:
        return f"unknown key {path!r}; did you mean {close[0]!r}?"
    group = path.rpartition(".")[0]
    inside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == group]
    return f"unknown key {path!r}. Known{' in ' + group if group else ''}: {', '.join(inside)}."


def _path(loc: Sequence[str | int]) -> str:
    """Dotted key of an error; positions in lists and pydantic's own parts are left out."""
    parts = [str(part) for part in loc if isinstance(part, str) and part != "[key]"]
    return ".".join(parts)


def _help(path: str) -> str:
    field = RunConfig.model_fields.get(path)
    return (field.description if field else None) or "required"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _full_stop(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."
