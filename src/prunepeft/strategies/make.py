"""The strategy of a run, from its settings."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError
from prunepeft.state import read_json
from prunepeft.strategies import METHODS
from prunepeft.strategies.base import Strategy


def make_strategy(config: RunConfig) -> Strategy:
    """The strategy of the method, with the settings of its own section of the configuration."""
    method = METHODS.get(config.method)
    known = {field.name for field in fields(method)}
    section = getattr(config, method.section).model_dump(include=known)
    _check_read(config, method)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    if config.strategy:
        data = read_json(Path(config.strategy))
        if not isinstance(data, dict) or not isinstance(data.get("strategy"), dict):
            raise ConfigError(
                f"{config.strategy} holds no strategy; give best/strategy.json of a finished run."
            )
        if "strategy" not in known:
            raise ConfigError(
                f"method {config.method} has no partitions, so strategy={config.strategy} says "
                "nothing to it; leave strategy out."
            )
        settings["strategy"] = data["strategy"]
    if method.cuts_base:
        settings |= _base_settings(config, settings)
    return method(**settings)


def reads(method: type[Strategy]) -> dict[str, set[str]]:
    """Section -> keys that this method reads, of the sections that belong to methods."""
    read = {"search": set(method.reads_search)}
    read.setdefault(method.section, set()).update(field.name for field in fields(method))
    return read


def changed_settings(config: RunConfig) -> list[tuple[str, str]]:
    """Section and key of all settings of methods that are not the default."""
    sections = {METHODS.get(name).section for name in METHODS.names()} | {"search"}
    return [
        (section, name)
        for section in type(config).model_fields
        if section in sections
        for name in _changed_keys(getattr(config, section))
    ]


def _changed_keys(section: BaseModel) -> list[str]:
    """Keys of a section that are not the default."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) != field.get_default(call_default_factory=True)
    ]


def _check_read(config: RunConfig, method: type[Strategy]) -> None:
    """Raise ConfigError for a setting of a method that this one does not read."""
    read = reads(method)
    for section, name in changed_settings(config):
        if name not in read.get(section, ()):
            known = (
                f"{s}.{key}"
                for s, keys in sorted(read.items())
                for key in sorted(keys & type(getattr(config, s)).model_fields.keys())
            )
            raise ConfigError(
                f"method {config.method} does not read {section}.{name}; leave it out (it reads "
                f"{', '.join(known)})."
            )


def _base_settings(config: RunConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What a method that cuts the base is told of it, where its own section is silent."""
    settings: dict[str, Any] = {"neuron_scope": config.base.scope}
    if config.base_ratio:
        silent = [n for n in ("head_ratio", "neuron_ratio") if own.get(n) is None]
        settings |= dict.fromkeys(silent, config.base_ratio)
    return settings
