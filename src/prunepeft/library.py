"""The main jobs as functions: the same settings and run folders as on the command line."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunepeft import run
from prunepeft.config import RunConfig, load_config
from prunepeft.result import Result, load_result

_SECTIONS = frozenset(
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)


def search(model: str, data: str, *, budget: str | int, **settings: Any) -> Result:
    """Find the modules a task needs under a budget, train them, and leave a run folder.

    Args:
        model: Folder or hub id of the base model.
        data: File, folder of splits, hub id, or `docstrings`.
        budget: The dial: `0.5%`, `120k`, `1.2M`, `12 modules` or `rank:64`.
        settings: Any other setting of the configuration, e.g. `kinds=["lora"]`,
            `train={"epochs": 5}`, `search={"fidelity": 0.2}`, `output="runs/mine"`.
    Returns:
        The result; the same call again returns it from the run folder.
    Raises:
        PrunePeftError: if anything about the input is wrong; nothing has been trained then.
    Example:
        >>> result = search("./model", "./train.jsonl", budget="1%")  # doctest: +SKIP
        >>> result.metric, result.adapter  # doctest: +SKIP
    """
    config = _config(model=model, data=data, budget=str(budget), **settings)
    run.search(config)
    return load_result(run.output_of(config))


def prune_base(model: str, data: str, *, ratio: float, **settings: Any) -> Path:
    """Remove attention heads and feed-forward neurons that a task does not need.

    Args:
        model: Folder or hub id of the base model.
        data: The task, as in `search`.
        ratio: Share of the heads and of the neurons that go, in (0, 1).
        settings: Any other setting, e.g. `base={"method": "loraprune", "epochs": 2}`.
    Returns:
        Folder of the smaller model, for `search` and for other tools; the same call again returns
        it at once.
    Raises:
        PrunePeftError: if anything about the input is wrong; nothing has been trained then.
    Example:
        >>> small = prune_base("./model", "./train.jsonl", ratio=0.3)  # doctest: +SKIP
        >>> search(str(small), "./train.jsonl", budget="1%")  # doctest: +SKIP
    """
    config = _config(model=model, data=data, base_ratio=ratio, **settings)
    run.prune_base(config)
    return run.base_output_of(config) / "base"


def _config(**settings: Any) -> RunConfig:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        opened = key in _SECTIONS and isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if opened else {key: value}
    return load_config(None, (), flat)
