"""One resolved configuration per run: file, dotted overrides and flags become a RunConfig."""

from prunepeft.config.load import load_config, validated
from prunepeft.config.model import RunConfig
from prunepeft.config.names import (
    BASE_METHOD_NAMES,
    CRITERION_NAMES,
    KIND_NAMES,
    KIND_PRESETS,
    METHOD_NAMES,
    TASK_NAMES,
)
from prunepeft.config.sections import TrainSettings
from prunepeft.config.template import config_schema, template

__all__ = [
    "BASE_METHOD_NAMES",
    "CRITERION_NAMES",
    "KIND_NAMES",
    "KIND_PRESETS",
    "METHOD_NAMES",
    "TASK_NAMES",
    "RunConfig",
    "TrainSettings",
    "config_schema",
    "load_config",
    "template",
    "validated",
]
