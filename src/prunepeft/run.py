"""The main job: plan, search, train what is left, prove it, and leave a run folder."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prunepeft.backends import make_backend
from prunepeft.config import RunConfig
from prunepeft.data import load_rows
from prunepeft.engine import Engine
from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.estimates import describe
from prunepeft.kinds import count_params
from prunepeft.places import base_output_of, check_job, check_sources, output_of
from prunepeft.plan import Plan, check_device, make_plan, problem_of
from prunepeft.processes import join, on_main
from prunepeft.progress import Progress, SilentProgress
from prunepeft.replica import make_replica
from prunepeft.report import write_report
from prunepeft.result import (
    build_base_result,
    build_result,
    data_record,
    environment,
    finished_run,
    training_record,
)
from prunepeft.shrinking import Shrunk, base_record, save_shrunk, shrink_base
from prunepeft.space import Placement
from prunepeft.state import RunFolder, read_json, write_folder, write_json
from prunepeft.strategies import SearchResult

logger = logging.getLogger(__name__)

BACKEND_KEYS = ("backend", "workers", "ray_address", "cache")  # none changes a result
IGNORED_ON_RESUME = ("output", "offline", "device", "shard", *BACKEND_KEYS)
SAME_METRIC = 1e-6


def check(config: RunConfig, place: Path | None = None) -> dict[str, Any]:
    """What would run and what it would cost; trains nothing and reads no weights."""
    RunFolder(place or output_of(config)).check_place()
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
    if config.budget is None and config.arch is None:
        raise ConfigError("budget is missing; give for example budget=1% (or arch=arch.json).")
    if dry_run:
        return check(config)
    return _work(_search, config, resume, overwrite, command, progress)


def prune_base(
    config: RunConfig,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the frozen model smaller for a task and save it, without a search for modules.

    Arguments and resuming as in `search`; `base_ratio` says how much goes. The folder `base/` of
    the run is an ordinary model folder, for `search` and for other tools.
    """
    if not config.base_ratio:
        raise ConfigError(
            "prune-base needs the share of heads and neurons to remove: give ratio=0.3, more than "
            "0 and less than 1."
        )
    if config.ist.enabled:
        raise ConfigError(
            "prune-base trains no modules that stay, so ist=on says nothing to it; give it to the "
            "search on the smaller base instead."
        )
    if dry_run:
        return check(config, base_output_of(config))
    return _work(_prune_base, config, resume, overwrite, command, progress)


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
    folder = finished_run(run)
    plan = plan_as_trained(folder)
    engine = Engine(plan, folder, is_main=False)
    if data is not None:
        part, rows = data, load_rows(data, like=plan.splits, offline=plan.config.offline)
    else:
        part = "validation" if plan.splits.test is None else "test"
        rows = getattr(plan.splits, part)
    return {"data": part, "rows": len(rows), "metrics": engine.measure(folder.adapter_dir, rows)}


def plan_as_trained(folder: RunFolder) -> Plan:
    """The plan of a finished run without a search, on the base that it cut itself, if it did."""
    config = RunConfig.model_validate(folder.read_config())
    change: dict[str, Any] = dict.fromkeys(("budget", "arch", "strategy", *BACKEND_KEYS))
    change |= {"baseline": "none", "method": "prunepeft", "base_ratio": 0.0}
    change |= {"backend": "serial", "shard": False}
    if folder.base_dir.is_dir():
        change["model"] = str(folder.base_dir)
        if config.precision == "auto" and check_device(config.device) == "cpu":
            change["precision"] = "fp32"  # as a run is that cuts the base
    return make_plan(config.model_copy(update=change))


def _work(
    job: Callable[[Plan, RunFolder, Engine, str], dict[str, Any]],
    config: RunConfig,
    resume: str,
    overwrite: bool,
    command: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Do a job in the run folder of a configuration, if it is not done yet."""
    place = output_of(config) if job is _search else base_output_of(config)
    folder = RunFolder(place)
    folder.check_place()
    check_sources(config, folder.path)
    is_main = join(check_device(config.device))
    if on_main(lambda: folder.is_run and not overwrite and folder.done):
        on_main(lambda: _reopen(_open(place, config, resume, overwrite)))
        return check_job(read_json(folder.result_file), job is _search, folder.path)
    plan = make_plan(config)
    folder = on_main(lambda: _open(place, config, resume, overwrite))
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(folder.lock()))
        if is_main:
            held.enter_context(_log_to(folder.log_file))
        began = time.time()
        on_main(lambda: _begin(plan, folder, command))
        engine = Engine(plan, folder, is_main=is_main, progress=progress or SilentProgress())
        result = job(plan, folder, engine, command)
        on_main(lambda: _finish(folder, result, time.time() - began))
        return result


def _search(plan: Plan, folder: RunFolder, engine: Engine, command: str) -> dict[str, Any]:
    whole = plan
    shrunk = None
    if plan.config.base_ratio and not plan.strategy.cuts_base:
        shrunk = shrink_base(plan, engine)
        plan = save_shrunk(plan, engine, shrunk)
    found = _find(plan, engine)
    if shrunk is not None:
        found.add(shrunk.watched)
    if found.cut is not None:
        shrunk = Shrunk(plan.groups, found.cut)
        plan = save_shrunk(plan, engine, shrunk)
    on_main(lambda: write_json(folder.history_file, found.history))
    seed = plan.config.seed
    outcome = engine.evaluator.train(
        found.placement, name="train", seed=seed, start=found.start, ist=plan.ist
    )
    baselines = _baselines(plan, engine, found.placement)
    with engine.trained(found.placement, outcome) as net:  # all have to, if each has a part
        on_main(lambda: _save_best(folder, net, found))
    reloaded = engine.measure(folder.adapter_dir)[plan.metric]
    _check_reloaded(plan, folder, outcome.metrics[plan.metric], reloaded)
    result = build_result(plan, found, outcome, baselines, reloaded, command)
    if shrunk is not None:
        result["model"]["n_params"] = whole.n_base
        result["base"] = base_record(whole, engine, shrunk)
    return result


def _prune_base(plan: Plan, folder: RunFolder, engine: Engine, command: str) -> dict[str, Any]:
    shrunk = shrink_base(plan, engine)
    save_shrunk(plan, engine, shrunk)
    metrics = engine.phases.evaluate(engine.model)
    return build_base_result(plan, base_record(plan, engine, shrunk), metrics, command)


@contextlib.contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """Append what the library logs to a file as well."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    library = logging.getLogger("prunepeft")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        handler.close()


def _begin(plan: Plan, folder: RunFolder, command: str) -> None:
    write_json(folder.environment_file, environment())
    write_json(folder.data_file, data_record(plan))
    folder.log_event("start", command=command)


def _finish(folder: RunFolder, result: dict[str, Any], seconds: float) -> None:
    folder.finish(result)
    if folder.best_dir.is_dir():
        write_report(folder.path)
    folder.log_event("done", seconds=seconds)


def _reopen(folder: RunFolder) -> None:
    """Write the report of a finished run that ended before its last file was there."""
    logger.info("%s is finished already", folder.path)
    if folder.best_dir.is_dir() and not folder.report_file.is_file():
        with folder.lock():
            write_report(folder.path)


def _find(plan: Plan, engine: Engine) -> SearchResult:
    if plan.given is not None:
        return SearchResult(plan.given, history={"mode": "given", "rounds": []})
    config = plan.config.model_copy(update={"device": check_device(plan.config.device)})
    build = partial(make_replica, config, engine.folder.path.absolute())
    log = engine.folder.log_file.with_name("workers.log")
    with make_backend(config, build, engine.phases.progress, log) as backend:
        problem = problem_of(plan, engine.evaluator, engine.on_event, backend)
        return plan.strategy.search(problem)


def _baselines(plan: Plan, engine: Engine, kept: Placement) -> list[dict[str, Any]]:
    """Plain LoRA with as many trainable parameters as the result may have."""
    in_parameters = plan.budget is not None and plan.budget.unit == "parameters"
    placement = plan.baseline(plan.limit if in_parameters else count_params(kept))
    if placement is None:
        return []
    name = {"lora": "lora q+v", "lora-all": "lora all"}[plan.config.baseline]
    name += " (same base)" if plan.groups else ""
    outcome = engine.evaluator.train(placement, name=f"plain {name}", seed=plan.config.seed)
    rank = max(placement.sizes.values())
    entry = {"name": name, "n_params": outcome.n_params, "rank": rank}
    return [entry | training_record(plan, outcome)]


def _save_best(folder: RunFolder, net: Any, found: SearchResult) -> None:
    """Write `best/`: the placement, the strategy and the adapter."""
    folder.best_dir.mkdir(exist_ok=True)
    write_json(folder.arch_file, found.placement.to_dict())
    kept = ("strategy", "mode")
    write_json(folder.strategy_file, {k: found.history[k] for k in kept if k in found.history})
    write_folder(folder.adapter_dir, lambda place: net.save_pretrained(str(place)))


def _check_reloaded(plan: Plan, folder: RunFolder, trained: float, reloaded: float) -> None:
    """A run is done only if the adapter on disk is as good as the one that was trained."""
    if abs(reloaded - trained) > SAME_METRIC * max(1.0, abs(trained)):
        raise CheckpointError(
            f"the adapter in {folder.adapter_dir} gives {plan.metric} {reloaded}, but training "
            f"gave {trained}; the folder is damaged. Remove it and run the same command again."
        )


def _open(place: Path, config: RunConfig, resume: str, overwrite: bool) -> RunFolder:
    return RunFolder.open(
        place,
        config=config.to_dict(),
        resume=resume,
        overwrite=overwrite,
        ignore=IGNORED_ON_RESUME,
    )
