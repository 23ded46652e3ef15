"""The main job: plan, search, train what is left, prove it, and leave a run folder."""

import contextlib
import logging
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from prunepeft._version import __version__
from prunepeft.config import RunConfig, load_config
from prunepeft.errors import CheckpointError, ConfigError, StateError
from prunepeft.evaluate import Outcome, TrainerEvaluator
from prunepeft.kinds import cost, count_params, n_params
from prunepeft.metrics import METRICS
from prunepeft.plan import Plan, check_device, describe, make_plan, problem_of
from prunepeft.progress import Progress, SilentProgress
from prunepeft.space import Placement
from prunepeft.state import RunFolder, read_json, write_folder, write_json
from prunepeft.strategies import SearchResult
from prunepeft.training import Phases, derive_seed, quiet_warnings

logger = logging.getLogger(__name__)

IGNORED_ON_RESUME = ("output", "offline", "device")
SAME_METRIC = 1e-6


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
        """Write the adapter for another tool; see `prunepeft export --help` for the formats."""
        from prunepeft.supernet.export import export_run

        return Path(export_run(self.path, format)["path"])


def search_model(model: str, data: str, *, budget: str | int, **settings: Any) -> Result:
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
        >>> result = search_model("./model", "./train.jsonl", budget="1%")  # doctest: +SKIP
        >>> result.metric, result.adapter  # doctest: +SKIP
    """
    flat = {"model": model, "data": data, "budget": str(budget), **_flatten(settings)}
    config = load_config(None, (), flat)
    search(config)
    return load_result(output_of(config))


def load_result(run: str | Path) -> Result:
    """Read a finished run. Raises StateError if it is not finished."""
    folder = RunFolder(run)
    if not folder.done:
        raise StateError(f"{run} holds no finished run; run the same command again to finish it.")
    report = read_json(folder.result_file)
    return Result(
        path=folder.path,
        placement=Placement.from_dict(read_json(folder.arch_file)),
        metric=report["metric"]["value"],
        report=report,
        history=read_json(folder.history_file),
    )


def check(config: RunConfig) -> dict[str, Any]:
    """What would run and what it would cost; trains nothing and reads no weights."""
    check_output(config)
    return describe(make_plan(config))


def search(
    config: RunConfig,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search, train, prove and report. The same call again goes on where it stopped.

    Args:
        config: All settings.
        resume: `auto` or `never`.
        overwrite: Start again in a folder that holds another run.
        dry_run: Only `check`.
        command: Command line, for the record.
        progress: Where progress goes.
    Returns:
        The content of `result.json`, or of `check`.
    """
    if dry_run:
        return check(config)
    with _processes(config) as (is_main, wait):
        finished = _finished(config, overwrite, resume)
        if finished is not None:
            return finished
        plan = make_plan(config)
        folder = RunFolder(output_of(config))
        if is_main:
            folder = _open(config, resume, overwrite)
        wait()
        with folder.lock() if is_main else contextlib.nullcontext():
            return _search(plan, folder, is_main, wait, command, progress or SilentProgress())


def train(config: RunConfig, **kwargs: Any) -> dict[str, Any]:
    """Train a given architecture (`arch=`): the second half of `search`."""
    if config.arch is None:
        raise ConfigError(
            "train needs an architecture: give arch=RUN/best/arch.json (or the run folder), or use "
            "`prunepeft search` to find one."
        )
    return search(config, **kwargs)


def evaluate(run: Path, data: str | None = None) -> dict[str, Any]:
    """Metrics of a finished run's adapter, loaded from disk, on its own or other data.

    Args:
        run: The run folder.
        data: Data with the same columns and labels; default: the run's test split, else validation.
    """
    folder = RunFolder(run)
    if not folder.done:
        raise StateError(f"{run} holds no finished run; finish it with the same command as before.")
    config = RunConfig.model_validate(folder.read_config())
    plan = make_plan(config)
    evaluator = _make_evaluator(plan, folder, False, SilentProgress())
    part, rows = ("test", plan.splits.test) if plan.splits.test is not None else (
        "validation",
        plan.splits.validation,
    )
    if data is not None:
        from prunepeft.data import load_rows

        part, rows = data, load_rows(data, like=plan.splits, offline=config.offline)
    encoded = evaluator.encode(rows)
    metrics = _reload(evaluator, folder.adapter_dir, encoded)
    return {"data": part, "rows": len(rows), "metrics": metrics}


def output_of(config: RunConfig) -> Path:
    """The run folder: as given, or a name made from data, method and seed."""
    if config.output:
        return Path(config.output)
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(config.data).stem or config.data).strip("-") or "run"
    return Path("runs") / f"{name}-{config.method}-{config.seed}"


def check_output(config: RunConfig) -> None:
    """Raise ConfigError now if the run folder could not be used later."""
    RunFolder(output_of(config)).check_place()


def _search(
    plan: Plan, folder: RunFolder, is_main: bool, wait: Any, command: str, progress: Progress
) -> dict[str, Any]:
    config = plan.config
    began = time.time()
    if is_main:
        write_json(folder.environment_file, environment())
        write_json(folder.data_file, _data_record(plan))
        folder.log_event("start", command=command)

    def on_event(kind: str, **fields: Any) -> None:
        if is_main:
            folder.log_metrics(kind=kind, **fields)

    with quiet_warnings():
        evaluator = _make_evaluator(plan, folder, is_main, progress, on_event)
        found = _find(plan, evaluator, on_event)
        if is_main:
            write_json(folder.history_file, found.history)
        outcome = evaluator.train(found.placement, name="train", seed=config.seed)
        baselines = _baselines(plan, evaluator, found.placement)
        if is_main:
            _save_best(plan, folder, evaluator, found, outcome)
        wait()
        reloaded = _reload(evaluator, folder.adapter_dir, evaluator.phases.validation)
    value = reloaded[plan.metric]
    if abs(value - outcome.metrics[plan.metric]) > SAME_METRIC * max(1.0, abs(value)):
        raise CheckpointError(
            f"the saved adapter gives {plan.metric} {value}, but training gave "
            f"{outcome.metrics[plan.metric]}; {folder.adapter_dir} is damaged. Run again."
        )
    result = _result(plan, found, outcome, baselines, value, command)
    if is_main:
        folder.finish(result)
        folder.log_event("done", seconds=time.time() - began)
        from prunepeft.report import write_report

        write_report(folder.path)
    wait()
    return result


def _find(plan: Plan, evaluator: TrainerEvaluator, on_event: Any) -> SearchResult:
    if plan.given is not None:
        return SearchResult(plan.given, {"mode": "given", "space": None, "rounds": []})
    return plan.strategy.search(problem_of(plan, evaluator, on_event))


def _baselines(plan: Plan, evaluator: TrainerEvaluator, kept: Placement) -> list[dict[str, Any]]:
    """Plain LoRA with as many trainable parameters as the result may have."""
    in_parameters = plan.budget is not None and plan.budget.unit == "parameters"
    placement = plan.baseline(plan.limit if in_parameters else count_params(kept))
    if placement is None:
        return []
    name = {"lora": "lora q+v", "lora-all": "lora all"}[plan.config.baseline]
    outcome = evaluator.train(placement, name=f"plain {name}", seed=plan.config.seed)
    entry = {"name": name, "n_params": outcome.n_params, "rank": max(placement.sizes.values())}
    return [entry | _training(plan, outcome)]


def _training(plan: Plan, outcome: Outcome) -> dict[str, Any]:
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


def _result(
    plan: Plan,
    found: SearchResult,
    outcome: Outcome,
    baselines: list[dict[str, Any]],
    reloaded: float,
    command: str,
) -> dict[str, Any]:
    config, placement = plan.config, found.placement
    trained = _training(plan, outcome)
    metric = trained.pop("metric") | {"reloaded": reloaded}
    realised = cost(placement, plan.budget.unit) if plan.budget else count_params(placement)
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
    space = plan.space.full() if plan.space else placement
    return {
        "schema_version": 1,
        "prunepeft_version": __version__,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method,
        "seed": config.seed,
        "task": {
            "name": plan.task.name,
            "metric": plan.metric,
            "greater_is_better": METRICS.get(plan.metric).greater_is_better,
            "n_train": len(plan.splits.train),
            "n_validation": len(plan.splits.validation),
            "labels": list(plan.splits.labels) if plan.splits.labels else None,
        },
        "model": {"name": config.model, "family": plan.family, "n_params": plan.n_base},
        "data": {"source": plan.splits.source, "fingerprint": plan.splits.fingerprint},
        "budget": {
            "text": str(plan.budget) if plan.budget else None,
            "unit": plan.budget.unit if plan.budget else "parameters",
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
        "head_params": outcome.head_params,
        "metric": metric,
        "search": {
            "seconds": found.seconds,
            "steps": found.steps,
            "rounds": len(found.history.get("rounds", [])),
            "runs": found.runs,
            "peak_memory_bytes": found.peak_memory_bytes,
        },
        "train": trained,
        "baselines": baselines,
        "environment": environment(),
    }


def _save_best(
    plan: Plan, folder: RunFolder, evaluator: TrainerEvaluator, found: SearchResult, outcome: Outcome
) -> None:
    """Write `best/`: placement, strategy, adapter, and what a reader needs to load it."""
    write_json(folder.arch_file, found.placement.to_dict())
    write_json(
        folder.strategy_file,
        {"strategy": found.history.get("strategy", {}), "mode": found.history.get("mode")},
    )
    net = evaluator.attach(found.placement, evaluator.weights(outcome))
    try:
        write_folder(folder.adapter_dir, lambda d: net.save_pretrained(d))
    finally:
        evaluator.detach(net)


def _reload(evaluator: TrainerEvaluator, adapter: Path, rows: Any) -> dict[str, float]:
    """Metrics of the adapter as read back from disk."""
    net = PeftModel.from_pretrained(evaluator.model, str(adapter))
    try:
        return evaluator.phases.evaluate(net, rows)
    finally:
        evaluator.detach(net)


def _make_evaluator(
    plan: Plan,
    folder: RunFolder,
    is_main: bool,
    progress: Progress,
    on_event: Any = lambda kind, **fields: None,
) -> TrainerEvaluator:
    config, task = plan.config, plan.task
    device = check_device(config.device)
    bf16 = _use_bf16(config.precision, device)
    tokenizer = task.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    length = config.train.max_length

    def encode(rows: Any) -> Any:
        return task.encode(rows, plan.splits, tokenizer, length)

    train_rows, validation = encode(plan.splits.train), encode(plan.splits.validation)
    model = task.load_model(
        config.model,
        plan.splits,
        dtype="bfloat16" if bf16 else "float32",
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    for name in plan.head:
        model.get_submodule(name).float()
    phases = Phases(
        train=train_rows,
        validation=validation.sort("length") if "length" in validation.column_names else validation,
        collator=task.collator(tokenizer),
        compute=task.compute,
        preprocess_logits=task.preprocess_logits,
        settings=config.train,
        device=device,
        bf16=bf16,
        progress=progress,
    )
    context = {
        "model": config.model,
        "data": plan.splits.fingerprint,
        "task": task.name,
        "metric": plan.metric,
        "bf16": bf16,
        "head_seed": config.seed,
        "train": config.train.model_dump(mode="json", exclude={"epochs"}),
        "search_lr": config.search.lr,
        "version": __version__,
    }
    evaluator = TrainerEvaluator(
        model,
        phases,
        task_type=task.peft_task_type,
        head=plan.head,
        metric=plan.metric,
        greater_is_better=METRICS.get(plan.metric).greater_is_better,
        label_column="labels" if plan.splits.labels else None,
        journal=folder.journal,
        state_dir=folder.state_dir,
        search_lr=config.search.lr or config.train.lr,
        context=context,
        writes=is_main,
        on_event=on_event,
    )
    evaluator.encode = encode
    return evaluator


def _use_bf16(precision: str, device: str) -> bool:
    if precision == "auto":
        return device == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def _finished(config: RunConfig, overwrite: bool, resume: str) -> dict[str, Any] | None:
    """Result of the same run if it is done already."""
    folder = RunFolder(output_of(config))
    if overwrite or not folder.is_run or not folder.done:
        return None
    RunFolder.open(
        folder.path, config=config.to_dict(), resume=resume, ignore=IGNORED_ON_RESUME
    )
    logger.info("%s is finished already", folder.path)
    return read_json(folder.result_file)


def _open(config: RunConfig, resume: str, overwrite: bool) -> RunFolder:
    return RunFolder.open(
        output_of(config),
        config=config.to_dict(),
        resume=resume,
        overwrite=overwrite,
        ignore=IGNORED_ON_RESUME,
    )


@contextlib.contextmanager
def _processes(config: RunConfig) -> Iterator[tuple[bool, Any]]:
    """Whether this is the main process, and a barrier; joins the group torchrun made, if any."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True, lambda: None
        return
    from accelerate import PartialState

    state = PartialState(cpu=check_device(config.device) == "cpu")
    yield state.is_main_process, state.wait_for_everyone


def _data_record(plan: Plan) -> dict[str, Any]:
    splits = plan.splits
    return {
        "source": splits.source,
        "fingerprint": splits.fingerprint,
        "task": plan.task.name,
        "columns": splits.columns,
        "labels": list(splits.labels) if splits.labels else None,
        "rows": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test) if splits.test is not None else 0,
        },
        "notes": list(splits.notes),
        "seed": plan.config.seed,
        "data_order_seed": derive_seed(plan.config.seed, "train", 1),
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


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; groups (`train`, `search`) are opened, other mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("train", "search") and isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[prefix + key] = value
    return flat
