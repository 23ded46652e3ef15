"""What a run leaves: the content of `result.json`, and a finished run read back."""

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from prunepeft._version import __version__
from prunepeft.errors import StateError
from prunepeft.evaluate import Outcome
from prunepeft.kinds import cost, count_params, n_params
from prunepeft.metrics import METRICS
from prunepeft.plan import Plan, check_device
from prunepeft.space import Placement
from prunepeft.state import RunFolder, read_json
from prunepeft.strategies import SearchResult

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: The run folder.
        placement: What was kept.
        metric: Value of the metric that decides, on the validation split.
        report: Everything that is in `result.json`.
        history: The evidence of the search.
    """

    path: Path
    placement: Placement
    metric: float
    report: dict[str, Any] = field(repr=False)
    history: dict[str, Any] = field(repr=False)

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter; load it with `PeftModel.from_pretrained`."""
        return self.path / "best" / "adapter"

    def export(self, format: str = "peft") -> Path:
        """Write the adapter for another tool (`peft`, `serve`, `merged`, `axolotl`, `trl`)."""
        from prunepeft.supernet.export import export_run

        return Path(export_run(self.path, format)["path"])


def load_result(run: str | Path) -> Result:
    """Read a finished run. Raises StateError if it is not finished."""
    folder = finished_run(run)
    report = read_json(folder.result_file)
    return Result(
        path=folder.path,
        placement=Placement.from_dict(read_json(folder.arch_file)),
        metric=report["metric"]["value"],
        report=report,
        history=read_json(folder.history_file),
    )


def finished_run(run: str | Path) -> RunFolder:
    """The folder of a finished run, else StateError."""
    folder = RunFolder(run)
    if not folder.done:
        raise StateError(
            f"{run} holds no finished run; run the command that started it again, it goes on where "
            "it stopped."
        )
    if not folder.adapter_dir.is_dir():
        raise StateError(
            f"{run} holds a finished prune-base run and no adapter; use its base model: "
            f"prunepeft search --model {folder.base_dir} ..."
        )
    return folder


def training_record(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Metric, cost and curve of one training."""
    return {
        "metric": {
            "name": plan.metric,
            "value": outcome.metrics[plan.metric],
            "all": outcome.metrics,
            "best_epoch": outcome.best_epoch,
        },
        "seconds": outcome.seconds,
        "steps": outcome.steps,
        "epochs": plan.config.train.epochs,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "curve": outcome.curve,
    }


def build_result(
    plan: Plan,
    found: SearchResult,
    outcome: Outcome,
    baselines: list[dict[str, Any]],
    reloaded: float,
    command: str,
) -> dict[str, Any]:
    """The content of `result.json`."""
    trained = training_record(plan, outcome)
    metric = trained.pop("metric") | {"reloaded": reloaded}
    return {
        "schema_version": SCHEMA_VERSION,
        "prunepeft_version": __version__,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": plan.config.method,
        "seed": plan.config.seed,
        **_input_record(plan),
        **_placement_record(plan, found.placement),
        "head_params": outcome.head_params,
        "metric": metric,
        "search": {
            "seconds": found.seconds,
            "steps": found.steps,
            "rounds": len(found.history.get("rounds", [])),
            "runs": found.runs,
            "continues": bool(found.start),
            "peak_memory_bytes": found.peak_memory_bytes,
        },
        "train": trained,
        "baselines": baselines,
        "environment": environment(),
    }


def build_base_result(
    plan: Plan, base: dict[str, Any], metrics: dict[str, float], command: str
) -> dict[str, Any]:
    """The content of `result.json` where only the base model was made smaller."""
    return {
        "schema_version": SCHEMA_VERSION,
        "prunepeft_version": __version__,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": plan.config.base.method,
        "seed": plan.config.seed,
        **_input_record(plan),
        "base": base,
        "metric": {"name": plan.metric, "value": metrics[plan.metric], "all": metrics},
        "environment": environment(),
    }


def data_record(plan: Plan) -> dict[str, Any]:
    """The content of `data.json`."""
    splits = plan.splits
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {
        "source": splits.source,
        "fingerprint": splits.fingerprint,
        "task": plan.task.name,
        "columns": splits.columns,
        "labels": list(splits.labels) if splits.labels else None,
        "rows": {name: len(part) for name, part in parts.items() if part is not None},
        "notes": list(splits.notes),
        "seed": plan.config.seed,
    }


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    import peft
    import transformers

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "device": cuda or "cpu",
        "threads": torch.get_num_threads(),
    }


def _input_record(plan: Plan) -> dict[str, Any]:
    splits = plan.splits
    return {
        "task": {
            "name": plan.task.name,
            "metric": plan.metric,
            "greater_is_better": METRICS.get(plan.metric).greater_is_better,
            "n_train": len(splits.train),
            "n_validation": len(splits.validation),
            "labels": list(splits.labels) if splits.labels else None,
        },
        "model": _model_record(plan),
        "data": {"source": splits.source, "fingerprint": splits.fingerprint},
    }


def _model_record(plan: Plan) -> dict[str, Any]:
    record = {"name": plan.config.model, "family": plan.family, "n_params": plan.n_base}
    if plan.storage is None:
        return record
    dtype = "bfloat16" if plan.uses_bf16(check_device(plan.config.device)) else "float32"
    held = {"words": plan.storage.in_words, "settings": plan.storage.arguments(dtype)}
    held |= {"head": list(plan.head)}
    return record | {"quantization": held}


def _placement_record(plan: Plan, placement: Placement) -> dict[str, Any]:
    unit = plan.budget.unit if plan.budget else "parameters"
    realised = cost(placement, unit)
    space = plan.space.full() if plan.space else placement
    modules = [
        {
            "id": s.id,
            "kind": s.kind,
            "size": n,
            "n_params": n_params(s, n),
            "paths": [site.path for site in s.sites],
        }
        for s, n in placement.sizes.items()
    ]
    return {
        "budget": {
            "text": str(plan.budget) if plan.budget else None,
            "unit": unit,
            "limit": plan.limit if plan.budget else realised,
            "realised": realised,
        },
        "space": {
            "n_slots": len(space),
            "n_params": count_params(space),
            "kinds": list(space.kinds),
        },
        "placement": {
            "digest": placement.digest,
            "n_modules": len(placement),
            "n_params": count_params(placement),
            "kinds": list(placement.kinds),
            "modules": modules,
        },
    }
