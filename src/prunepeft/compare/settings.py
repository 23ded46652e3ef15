"""Settings of one run of a comparison: what all runs share, less what only other methods read."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunepeft.candidates import make_lora_baseline
from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError
from prunepeft.plan import BASELINE_ROLES, make_plan
from prunepeft.processes import on_main
from prunepeft.space import Placement
from prunepeft.state import write_json
from prunepeft.strategies import METHODS
from prunepeft.strategies.black_box import BlackBox

PLAIN = tuple(BASELINE_ROLES)  # plain LoRA, no search
_UNSEARCHED = {"arch": None, "strategy": None, "baseline": "none"}
NO_TRIALS = {"backend": "serial", "workers": None, "ray_address": None}
_SHARED = {"search": {"fidelity", "epochs", "lr"}}


def is_black_box(method: str) -> bool:
    """Whether it is a black-box search, whose steps can be set."""
    return method not in PLAIN and issubclass(METHODS.get(method), BlackBox)


def folder_of(output: Path, method: str, cost: str, seed: int) -> Path:
    """Run folder of a cell."""
    return output / "runs" / f"{method}-{cost}-{seed}"


def cell_config(config: RunConfig, method: str, seed: int, output: Path) -> RunConfig:
    """Settings of a run at own cost: the shared ones, less what only other methods read."""
    settings: dict[str, Any] = {
        "method": "prunepeft" if method in PLAIN else method,
        "seed": seed,
        "baseline": "none",
        "output": str(folder_of(output, method, "own", seed)),
    }
    if not is_black_box(method):
        settings |= NO_TRIALS
    if method in PLAIN:
        settings |= {"arch": str(placement_file(output, method)), "strategy": None}
    elif "strategy" not in {f.name for f in fields(METHODS.get(method))}:
        settings["strategy"] = None
    unread = {section: {} for section in _sections()}
    for section, name in changed_settings(config):
        if name not in reads(method).get(section, set()):
            field = type(getattr(config, section)).model_fields[name]
            unread[section][name] = field.get_default(call_default_factory=True)
    return with_settings(config, settings | {s: values for s, values in unread.items() if values})


def reads(method: str) -> dict[str, set[str]]:
    """Section -> keys, of the sections of methods, that this method reads."""
    read = {section: set(names) for section, names in _SHARED.items()}
    if method in PLAIN:
        return {}
    found = METHODS.get(method)
    read.setdefault(found.section, set()).update(f.name for f in fields(found))
    return read


def changed_settings(config: RunConfig) -> list[tuple[str, str]]:
    """Section and key of all settings of methods that are not the default."""
    found = []
    for section in _sections():
        values = getattr(config, section)
        for name, field in type(values).model_fields.items():
            if getattr(values, name) != field.get_default(call_default_factory=True):
                found.append((section, name))
    return found


def _sections() -> Sequence[str]:
    """Sections of the configuration that belong to methods."""
    named = {METHODS.get(name).section for name in METHODS.names()}
    return [n for n in RunConfig.model_fields if n in named | set(_SHARED)]


def placement_file(output: Path, method: str) -> Path:
    """Where the placement of plain LoRA is."""
    return output / "placements" / f"{method}.json"


def plain_placement(config: RunConfig, method: str, seed: int) -> Placement:
    """Plain LoRA of the largest rank within the budget. Raises ConfigError if it has no such."""
    plan = make_plan(with_settings(config, {"method": "prunepeft", **_UNSEARCHED, "seed": seed}))
    if plan.budget is None or plan.budget.unit != "parameters":
        raise ConfigError(
            f"method {method} is plain LoRA of the largest rank within a number of parameters; the "
            f"budget is {plan.budget}. Give one such as 1% or 120k, or leave {method} out."
        )
    return make_lora_baseline(plan.sites, plan.limit, roles=BASELINE_ROLES[method])


def place_plain(config: RunConfig, method: str, seed: int, output: Path) -> None:
    """Write the placement of plain LoRA to where its run looks for it."""
    placement = plain_placement(cell_config(config, method, seed, output), method, seed)
    on_main(lambda: _write(placement_file(output, method), placement.to_dict()))


def _write(file: Path, data: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, data)


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values, checked again; mappings change single keys."""
    whole = config.to_dict() | {"trust_remote_code": config.trust_remote_code}
    for key, value in settings.items():
        is_section = isinstance(getattr(config, key), BaseModel)
        whole[key] = whole[key] | value if is_section else value
    return RunConfig.model_validate(whole)
