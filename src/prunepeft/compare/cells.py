"""One run of a comparison: a method with a seed, at its own cost or at the steps of another run.

Every run is an ordinary run folder, so that each resumes by itself.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from prunepeft import run
from prunepeft.batches import n_steps
from prunepeft.compare.comparison import Cell
from prunepeft.compare.settings import (
    NO_TRIALS,
    PLAIN,
    cell_config,
    folder_of,
    is_black_box,
    place_plain,
    with_settings,
)
from prunepeft.config import RunConfig
from prunepeft.errors import DiskError, LockedError, PrunePeftError
from prunepeft.estimates import planned_steps, shrinking_steps
from prunepeft.plan import Plan, make_plan, problem_of
from prunepeft.processes import on_main
from prunepeft.state import RunFolder, read_json
from prunepeft.strategies import METHODS, HybridPruning

logger = logging.getLogger(__name__)

_PLACES = run.IGNORED_ON_RESUME  # settings that say where, not what


def run_own(config: RunConfig, method: str, seed: int, output: Path, **how: Any) -> Cell:
    """Run a method as it is set.

    Args:
        config: Settings that all runs share.
        method: A search method, or plain LoRA (`lora`, `lora-all`).
        seed: Of the run.
        output: Folder of the comparison; the run goes to `runs/<method>-own-<seed>` in it.
        how: As for `prunepeft.run.search`.
    Returns:
        The cell; a run that failed with an error of ours is one too.
    """
    own = cell_config(config, method, seed, output)
    try:
        if method in PLAIN:
            place_plain(config, method, seed, output)
        return _run(own, method, "own", **how)
    except (LockedError, DiskError):
        raise
    except PrunePeftError as error:
        return _failed(method, "own", seed, own.output, error)


def run_equal(config: RunConfig, own: Cell, reference: Cell, output: Path, **how: Any) -> Cell:
    """Run a method again so that search and retraining take the steps of the reference.

    A black-box search gets all steps that the retraining leaves. A method that takes more searches
    on fewer rows. One that takes less trains what it found for more whole epochs. Where that is the
    run at own cost, its result is taken over.

    Args:
        config: Settings that all runs share.
        own: The method's run at own cost.
        reference: That of the reference with the same seed.
        output: Folder of the comparison; the run goes to `runs/<method>-equal-<seed>` in it.
        how: As for `prunepeft.run.search`.
    """
    method, seed, allowance = own.method, own.seed, reference.steps
    place = str(folder_of(output, method, "equal", seed))
    if reference.metric is None:
        text = f"the reference {reference.method} failed, so there is no allowance"
        return Cell(method, "equal", seed, place, error=text)
    try:
        base = cell_config(config, method, seed, output)
        settings, note = more_trials(base, allowance) if method != reference.method else (None, "")
        if settings is None and own.metric is None and not own.error:
            own = run_own(config, method, seed, output, **how)
        if settings is None and own.metric is None:
            return changed(own, cost="equal", allowance=allowance)
        if settings is None:
            settings, note = other_length(base, own, reference)
        if settings is None:
            return changed(own, cost="equal", taken_over=True, note=note, allowance=allowance)
        equal = with_settings(base, settings | {"output": place})
        cell = _run(equal, method, "equal", **how)
    except (LockedError, DiskError):
        raise
    except PrunePeftError as error:
        return _failed(method, "equal", seed, place, error, allowance=allowance)
    if equal.arch is not None:  # what the search took, which is not repeated
        cell = changed(
            cell,
            search_steps=own.search_steps,
            search_seconds=own.search_seconds,
            peak_memory_bytes=max(cell.peak_memory_bytes, own.peak_memory_bytes),
            trace=own.trace,
        )
    return changed(cell, note=note, allowance=allowance)


def other_length(base: RunConfig, own: Cell, reference: Cell) -> tuple[dict[str, Any] | None, str]:
    """What equal cost changes of a method that trains for a fixed time; None: nothing."""
    if own.method == reference.method:
        return None, ""
    if own.steps > reference.steps:
        return _fewer_rows(make_plan(base), own, reference.steps)
    settings, note = _more_epochs(own, reference.steps)
    if settings is not None and (own.continues or base.base_ratio):
        settings |= {"search": _as_long(make_plan(base))}
    elif settings is not None:
        settings |= {**NO_TRIALS, "arch": str(Path(own.run).absolute() / "best" / "arch.json")}
    return settings, note


def _as_long(plan: Plan) -> dict[str, Any]:
    """What keeps a search that is repeated as long as it was, though its training grows."""
    problem = problem_of(plan, None, None)
    fixed: dict[str, Any] = {}
    if "fidelity" in plan.strategy.reads_search:
        fixed["fidelity"] = problem.fidelity.data
    if isinstance(plan.strategy, HybridPruning):
        fixed["warmup_turns"] = plan.strategy.warm_up.n_turns(problem)
    return fixed


def more_trials(base: RunConfig, allowance: int) -> tuple[dict[str, Any] | None, str]:
    """Of a black-box search: all steps but those of the retraining go to trials; else None."""
    if base.arch is not None or not is_black_box(base.method):
        return None, ""
    plan = make_plan(base)
    train, problem = base.train, problem_of(plan, None, None)
    room = allowance - train.epochs * n_steps(len(plan.splits.train), train.batch_size)
    room -= shrinking_steps(plan)
    if room < 1 or problem.cost(plan.strategy.candidates(problem).full()) <= plan.limit:
        return None, ""
    start = {"initial": None} if hasattr(plan.strategy, "initial") else {}
    most = changed(plan.strategy, n_trials=room, max_steps=room, **start)
    cheapest = min(problem.n_steps(fidelity) for _, fidelity in most.stages(problem))
    if cheapest > room:
        return None, ""
    settings = {"n_trials": room // cheapest, "max_steps": room}
    initial = base.black_box.initial
    if initial is not None and initial > (n := settings["n_trials"]):
        settings["initial"] = n if n > 1 else None
    return {METHODS.get(base.method).section: settings}, f"{room:,} steps of trials"


def _fewer_rows(plan: Plan, own: Cell, allowance: int) -> tuple[dict[str, Any] | None, str]:
    """The largest share of the rows with which the search fits, by what it would take less."""
    section = METHODS.get(plan.config.method).section
    if "fidelity" not in type(getattr(plan.config, section)).model_fields:
        section = "search"
    if section == "search" and "fidelity" not in plan.strategy.reads_search:
        return None, f"sees no rows; the run at own cost stands, over by {_over(own, allowance)}"
    n, batch = len(plan.splits.train), plan.config.train.batch_size
    before = getattr(plan.config, section).fidelity or problem_of(plan, None, None).fidelity.data

    def seeing(fidelity: float) -> Plan:
        part = getattr(plan.config, section).model_copy(update={"fidelity": fidelity})
        return changed(plan, config=plan.config.model_copy(update={section: part}))

    room = allowance - own.train_steps
    full = planned_steps(seeing(before))
    for rows in range(int(before * n) // batch * batch, 0, -batch):
        share = rows / n
        fewer = seeing(share)
        if own.search_steps - (full - planned_steps(fewer)) <= room and share < before:
            try:
                fewer.strategy.check(problem_of(fewer, None, None))
            except PrunePeftError as error:
                return None, f"the run at own cost stands, over by {_over(own, allowance)}: {error}"
            return {section: {"fidelity": share}}, f"{section}.fidelity={share:.3g}"
    return (
        None,
        f"cannot be made to fit; the run at own cost stands, over by {_over(own, allowance)}",
    )


def _more_epochs(own: Cell, allowance: int) -> tuple[dict[str, Any] | None, str]:
    """What was found is trained for all whole epochs that the steps left allow."""
    per_epoch = own.train_steps // own.epochs
    epochs = (allowance - own.search_steps) // per_epoch
    if epochs <= own.epochs:
        return None, "no further whole epoch fits; the run at own cost stands"
    return {"train": {"epochs": epochs}}, f"train.epochs={epochs}"


def _over(own: Cell, allowance: int) -> str:
    return f"{own.steps / allowance:.2g}x"


def _run(config: RunConfig, method: str, cost: str, **how: Any) -> Cell:
    folder = RunFolder(config.output)
    if how.get("overwrite") or not on_main(lambda: _is_finished(folder, config)):
        logger.info("%s, %s cost, seed %d", method, cost, config.seed)
        run.search(config, **how)
    return on_main(lambda: read_cell(folder, method, cost))


def _is_finished(folder: RunFolder, config: RunConfig) -> bool:
    """Whether a run is done, perhaps in a comparison that was moved since."""
    if not folder.done or not folder.report_file.is_file():
        return False
    kinds = [
        {k: bool(v) if k == "arch" else v for k, v in settings.items() if k not in _PLACES}
        for settings in (folder.read_config(), config.to_dict())
    ]
    return kinds[0] == kinds[1]


def _failed(
    method: str, cost: str, seed: int, place: str, error: PrunePeftError, **more: Any
) -> Cell:
    logger.warning("%s, %s cost, seed %d failed: %s", method, cost, seed, error)
    text = f"{type(error).__name__}: {error}"
    return Cell(method, cost, seed, place, error=text, **more)


def read_cell(folder: RunFolder, method: str, cost: str = "own") -> Cell:
    """A finished run folder as a cell."""
    result = read_json(folder.result_file)
    search, train, metric = result["search"], result["train"], result["metric"]
    peaks = (part.get("peak_memory_bytes") or 0 for part in (search, train))
    return Cell(
        method=method,
        cost=cost,
        seed=result["seed"],
        run=str(folder.path),
        metric=metric["value"],
        metrics=metric["all"],
        n_params=result["placement"]["n_params"],
        used=result["budget"]["realised"],
        n_modules=result["placement"]["n_modules"],
        epochs=train["epochs"],
        search_steps=search["steps"],
        train_steps=train["steps"],
        search_seconds=search["seconds"],
        train_seconds=train["seconds"],
        peak_memory_bytes=max(peaks),
        continues=bool(search.get("continues")),
        trace=_trace(read_json(folder.history_file)),
    )


def _trace(history: Mapping[str, Any]) -> tuple[tuple[int, float, float], ...]:
    """Trials of the last stage in which one succeeded, each with the steps of all up to it."""
    steps, found = 0, []
    for trial in history.get("trials", ()):
        steps += trial["steps"]
        if trial["metric"] is not None:
            found.append((trial["stage"], (steps, trial["cost"], trial["metric"])))
    last = max((stage for stage, _ in found), default=0)
    return tuple(point for stage, point in found if stage == last)
