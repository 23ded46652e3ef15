"""Field types of the configuration: what a written value may look like and what it becomes.

Values from a file or the command line arrive as text (see `yaml_text`), so the field decides
what they mean: `no` stays the text "no" in a text field and becomes False in a switch.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from prunepeft.config.names import check_name, expand_presets
from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.registry import unknown_name

PLAIN_MODES = ("hybrid", "none", "random", "no_partitions")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def scalar(text: Any) -> Any:
    """A value of a free-form option: text that looks like a switch or a number becomes one.

    Example:
        >>> [scalar(t) for t in ("1e-4", "8", "true", "no", "gelu")]
        [0.0001, 8, True, 'no', 'gelu']
    """
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def no_switch(value: Any) -> Any:
    """Refuse True and False where a number is meant; Python counts them as 1 and 0."""
    if isinstance(value, bool):
        raise ConfigError("a switch is not a number")
    return value


def comma_list(value: Any) -> Any:
    """Text with commas becomes a list; a tuple becomes one as well."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, tuple) else value


def _sizes(value: Any) -> Any:
    items = comma_list(value) if isinstance(value, str | tuple) else value
    return items if isinstance(items, list) else [items]


def _groups(value: Any) -> Any:
    """`q+v, up` becomes [["q", "v"], ["up"]]: roles tied by + share one module."""
    items = comma_list(value)
    if not isinstance(items, list):
        return items
    return [item.split("+") if isinstance(item, str) else item for item in items]


def _options(value: Any) -> Any:
    return {k: scalar(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _unique(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given twice")
    return names


def _known(label: str, name: str) -> str:
    try:
        return check_name(label, name)
    except UnknownNameError as error:  # not a ValueError, which pydantic would collect
        raise ConfigError(str(error)) from None


def named(label: str) -> AfterValidator:
    """Validator for a name of the registry `label`."""
    return AfterValidator(lambda name: _known(label, name))


def _mode(value: str) -> str:
    if value.startswith("single:"):
        _known("criterion", value.removeprefix("single:"))
    elif value not in PLAIN_MODES:
        raise ConfigError(unknown_name("mode", value, (*PLAIN_MODES, "single:<criterion>")))
    return value


Count = Annotated[int, BeforeValidator(no_switch), Field(ge=1)]
Pair = Annotated[int, BeforeValidator(no_switch), Field(ge=2)]
Positive = Annotated[float, BeforeValidator(no_switch), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(no_switch), Field(ge=0, lt=1, allow_inf_nan=False)]
FullShare = Annotated[float, BeforeValidator(no_switch), Field(gt=0, le=1, allow_inf_nan=False)]
Ratio = Annotated[float, BeforeValidator(no_switch), Field(ge=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, BeforeValidator(no_switch), Field(ge=1, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(no_switch), Field(ge=0, allow_inf_nan=False)]
LAST_SEED = 2**31 - 1
Seed = Annotated[int, BeforeValidator(no_switch), Field(ge=0, le=LAST_SEED)]
Scope = Literal["layer", "global"]
Text = Annotated[str, Field(min_length=1)]
Kind = Annotated[str, named("kind")]
Method = Annotated[str, named("method")]
BaseMethod = Annotated[str, named("base method")]
TaskName = Annotated[str, named("task")]
Mode = Annotated[str, AfterValidator(_mode)]
Kinds = Annotated[
    list[Kind],
    BeforeValidator(expand_presets),
    BeforeValidator(comma_list),
    Field(min_length=1),
    AfterValidator(_unique),
]
Criteria = Annotated[
    list[Annotated[str, named("criterion")]],
    BeforeValidator(comma_list),
    Field(min_length=1),
    AfterValidator(_unique),
]
Sizes = dict[Kind, Annotated[list[Count], BeforeValidator(_sizes), Field(min_length=1)]]
Options = dict[Kind, Annotated[dict[str, Any], BeforeValidator(_options)]]
Roles = dict[Kind, Annotated[list[list[Text]], BeforeValidator(_groups), Field(min_length=1)]]
Rates = dict[Kind, Positive]
