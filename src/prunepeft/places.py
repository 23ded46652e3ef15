"""Where runs go, and what must not lie there."""

import re
from pathlib import Path
from typing import Any

from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError


def output_of(config: RunConfig) -> Path:
    """The run folder: as given, or a name made from data, method and seed."""
    return _output(config, config.method)


def base_output_of(config: RunConfig) -> Path:
    """The same for `prune_base`."""
    return _output(config, f"base-{config.base.method}")


def _output(config: RunConfig, what: str) -> Path:
    if config.output:
        return Path(config.output)
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(config.data).stem or config.data).strip("-") or "run"
    return Path("runs") / f"{name}-{what}-{config.seed}"


def check_sources(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError if the run would read from the folder it writes to."""
    for name in ("model", "data", "arch", "strategy", "cache"):
        source = getattr(config, name)
        if (
            source
            and Path(source).exists()
            and Path(source).resolve().is_relative_to(folder.resolve())
        ):
            raise ConfigError(
                f"{name}={source} lies in the run folder {folder}, which this run would write to; "
                "give another --output."
            )


def check_job(result: dict[str, Any], is_search: bool, folder: Path) -> dict[str, Any]:
    """The result of a finished run, if it is of the job asked for."""
    if ("placement" in result) != is_search:
        other = "prune-base" if is_search else "search"
        raise ConfigError(
            f"{folder} holds a finished run of {other}; give another --output (or --overwrite)."
        )
    return result
