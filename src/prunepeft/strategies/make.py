"""The strategy of a run, from its settings."""

from dataclasses import fields
from pathlib import Path
from typing import Any

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
    _check_read(config, method.section, known)
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


def _check_read(config: RunConfig, section: str, known: set[str]) -> None:
    """Raise ConfigError for a setting of a shared section that this method does not read."""
    own = getattr(config, section)
    shared = {"fidelity", "epochs", "lr"} if section == "search" else set()
    changed = [
        n
        for n, f in type(own).model_fields.items()
        if getattr(own, n) != f.get_default(call_default_factory=True)
    ]
    if ignored := [n for n in changed if n not in known | shared]:
        raise ConfigError(
            f"method {config.method} does not read {section}.{ignored[0]}; leave it out (it reads "
            f"{', '.join(sorted(known))})."
        )


def _base_settings(config: RunConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What a method that cuts the base is told of it, where its own section is silent."""
    settings: dict[str, Any] = {"neuron_scope": config.base.scope}
    if config.base_ratio:
        silent = [n for n in ("head_ratio", "neuron_ratio") if own.get(n) is None]
        settings |= dict.fromkeys(silent, config.base_ratio)
    return settings
