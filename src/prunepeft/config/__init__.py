"""One resolved configuration per run: file, dotted overrides and flags become a RunConfig."""

from prunepeft.config.load import load_config
from prunepeft.config.model import (
    CRITERION_NAMES,
    KIND_NAMES,
    KIND_PRESETS,
    METHOD_NAMES,
    TASK_NAMES,
    RunConfig,
    SearchSettings,
    TrainSettings,
)
from prunepeft.config.template import config_schema, template

__all__ = [
    "CRITERION_NAMES",
    "KIND_NAMES",
    "KIND_PRESETS",
    "METHOD_NAMES",
    "TASK_NAMES",
    "RunConfig",
    "SearchSettings",
    "TrainSettings",
    "config_schema",
    "load_config",
    "template",
]
