"""Compress a trained adapter, with density and scale chosen on validation rows if asked for."""

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict

from prunepeft.compression.adapter import Prepared, Settings
from prunepeft.compression.compeft import ALPHAS, DENSITIES, Choice, grid_search
from prunepeft.compression.folder import (
    AdapterFolder,
    check_output,
    compress_adapter,
    read_adapter_folder,
)
from prunepeft.config import load_config
from prunepeft.data import load_rows
from prunepeft.engine import Engine
from prunepeft.errors import ConfigError
from prunepeft.metrics import METRICS
from prunepeft.plan import make_plan
from prunepeft.result import finished_run
from prunepeft.run import plan_as_trained
from prunepeft.state import RunFolder

logger = logging.getLogger(__name__)

VALIDATION = "validation"


def compress(
    adapter: Path | str,
    output: Path | str,
    settings: Settings | None = None,
    *,
    codec: str = "golomb",
    snapshot: Path | str | None = None,
    tune: str | None = None,
    fixed: Collection[str] = (),
    model: str | None = None,
    task: str | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Compress an adapter; see `compression.compress_adapter`.

    Args:
        adapter: Adapter folder or run folder.
        output: Folder to make.
        settings: How to compress.
        codec: `golomb` or `bitmask`.
        snapshot: The adapter as it was before training.
        tune: Labelled rows to choose density and alpha on, or `validation` for the validation split
            of the run. These rows must not be the ones the result is judged on.
        fixed: Which of `density` and `alpha` are as in `settings` and not searched.
        model: Base model; needed to tune an adapter that is no run.
        task: Its task; default: found from the data.
        metric: Its metric; default: that of the task.
    """
    settings = settings or Settings()
    extra: dict[str, Any] = {}
    if tune is not None:
        source = read_adapter_folder(adapter)
        check_output(Path(output), source.path)
        if {*fixed} >= {"density", "alpha"}:
            raise ConfigError(
                "density and alpha are both given, so there is nothing to tune; leave out --tune, "
                "or one of them."
            )
        start = read_adapter_folder(snapshot).tensors if snapshot is not None else None
        prepared = Prepared(source.tensors, source.config, settings, start)
        with _engine(Path(adapter), tune, model, task, metric) as engine:
            search = _Tuning(engine, source, tune)
            best, extra["tuning"] = search.run(prepared, settings, fixed, start)
        settings = replace(settings, density=best.density, alpha=best.alpha)
    return compress_adapter(adapter, output, settings, codec=codec, snapshot=snapshot, extra=extra)


class _Tuning:
    """The base model with the adapter on it, whose values are replaced for every pair."""

    def __init__(self, engine: Engine, source: AdapterFolder, tune: str) -> None:
        self._engine = engine
        plan = engine.plan
        self._metric = plan.metric
        self._rows = engine.phases.validation
        if tune != VALIDATION:
            rows = load_rows(tune, like=plan.splits, offline=plan.config.offline)
            self._rows = engine.encode(rows)
        self._net = PeftModel.from_pretrained(engine.model, str(source.path))

    def measure(self) -> float:
        """The metric with the values that are on the model now."""
        return self._engine.phases.evaluate(self._net, self._rows)[self._metric]

    def run(
        self,
        prepared: Prepared,
        settings: Settings,
        fixed: Collection[str],
        snapshot: dict[str, Any] | None,
    ) -> tuple[Choice, dict[str, Any]]:
        """The best pair, and the record of all."""
        before = self.measure()

        def evaluate(density: float, alpha: float) -> float:
            tensors = prepared.compress(density, alpha).restore(snapshot)
            set_peft_model_state_dict(self._net, tensors)
            value = self.measure()
            logger.info("density %g, alpha %g: %s %.4f", density, alpha, self._metric, value)
            return value

        best, tried = grid_search(
            evaluate,
            greater_is_better=METRICS.get(self._metric).greater_is_better,
            densities=(settings.density,) if "density" in fixed else DENSITIES,
            alphas=(settings.alpha,) if "alpha" in fixed else ALPHAS,
        )
        record = {
            "metric": self._metric,
            "rows": len(self._rows),
            "before": before,
            "best": best.value,
            "tried": [asdict(choice) for choice in tried],
        }
        return best, record


@contextlib.contextmanager
def _engine(
    adapter: Path, tune: str, model: str | None, task: str | None, metric: str | None
) -> Iterator[Engine]:
    """The base model of a run, or of an adapter from elsewhere, with its data."""
    if RunFolder(adapter).is_run:
        if model or task or metric:
            raise ConfigError(
                f"{adapter} is a run and knows its model, task and metric; leave out --model, "
                "--task and --metric."
            )
        folder = finished_run(adapter)
        yield Engine(plan_as_trained(folder), folder, is_main=False)
        return
    if model is None or tune == VALIDATION:
        raise ConfigError(
            f"{adapter} is no run folder, so tuning needs the base model and labelled rows: give "
            "--model FOLDER --tune DATA, and --task if the data do not tell it. Without --tune "
            "nothing else is needed."
        )
    settings = {"model": model, "data": tune, "task": task, "metric": metric, "baseline": "none"}
    config = load_config(None, (), settings | {"budget": "1 modules"})  # no search needs one here
    plan = make_plan(config.model_copy(update={"budget": None}))
    with tempfile.TemporaryDirectory() as place:
        yield Engine(plan, RunFolder(place), is_main=False)
