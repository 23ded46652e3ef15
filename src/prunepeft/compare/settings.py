"""Settings of one run of a comparison: what all runs share, less what only other methods read."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunepeft.candidates import make_lora_baseline
from prunepeft.config import RunConfig, validated
from prunepeft.config.model import BASE_TRAINING
from prunepeft.errors import ConfigError
from prunepeft.plan import BASELINE_ROLES, make_plan
from prunepeft.processes import on_main
from prunepeft.space import Placement
from prunepeft.state import write_json
from prunepeft.strategies import METHODS, make
from prunepeft.strategies.black_box import BlackBox
from prunepeft.strategies.make import changed_settings

PLAIN = tuple(BASELINE_ROLES)  # plain LoRA, no search
_UNSEARCHED = {"arch": None, "strategy": None, "baseline": "none"}
NO_TRIALS = {"backend": "serial", "workers": None, "ray_address": None}


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
    elif not reads_strategy(method):
        settings["strategy"] = None
    if method not in PLAIN and METHODS.get(method).cuts_base:
        defaults = type(config.base)().model_dump()
        settings["base"] = {name: defaults[name] for name in BASE_TRAINING}
    for section, name in changed_settings(config):
        if name not in reads(method).get(section, set()):
            field = type(getattr(config, section)).model_fields[name]
            default = field.get_default(call_default_factory=True)
            settings.setdefault(section, {})[name] = default
    return with_settings(config, settings)


def reads_strategy(method: str) -> bool:
    """Whether the method can use the assignment of criteria of another run."""
    return method not in PLAIN and "strategy" in {f.name for f in fields(METHODS.get(method))}


def reads(method: str) -> Mapping[str, set[str]]:
    """Section -> keys, of the sections of methods, that this method reads."""
    return {} if method in PLAIN else make.reads(METHODS.get(method))


def placement_file(output: Path, method: str) -> Path:
    """Where the placement of plain LoRA is."""
    return (output / "placements" / f"{method}.json").absolute()


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
    return validated(whole)
