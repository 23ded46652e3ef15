"""One resolved configuration per run: file, dotted overrides and flags become a RunConfig."""

from prunepeft.config.load import load_config
from prunepeft.config.model import (
    BASE_METHOD_NAMES,
    CRITERION_NAMES,
    KIND_NAMES,
    KIND_PRESETS,
    METHOD_NAMES,
    TASK_NAMES,
    BaseSettings,
    LightPeftSettings,
    RunConfig,
    S3DeltaSettings,
    SearchSettings,
    SMamSettings,
    TrainSettings,
)
from prunepeft.config.template import config_schema, template

__all__ = [
    "BASE_METHOD_NAMES",
    "BaseSettings",
    "CRITERION_NAMES",
    "KIND_NAMES",
    "KIND_PRESETS",
    "METHOD_NAMES",
    "TASK_NAMES",
    "LightPeftSettings",
    "RunConfig",
    "S3DeltaSettings",
    "SMamSettings",
    "SearchSettings",
    "TrainSettings",
    "config_schema",
    "load_config",
    "template",
]
