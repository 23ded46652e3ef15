"""The comparison itself: all its runs, one after the other, and its page."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunepeft.compare.cells import read_cell, run_equal, run_own
from prunepeft.compare.checks import (
    SETTINGS,
    check_choice,
    check_folder,
    check_once,
    check_place,
    check_same,
    check_settings,
    default_reference,
    settings_of,
)
from prunepeft.compare.comparison import Cell, make_comparison
from prunepeft.compare.settings import PLAIN, cell_config, folder_of, is_black_box, plain_placement
from prunepeft.config import RunConfig
from prunepeft.errors import StateError
from prunepeft.places import check_sources
from prunepeft.plan import check_device, make_plan
from prunepeft.processes import join, on_main
from prunepeft.progress import Progress
from prunepeft.report.comparison_page import write_comparison
from prunepeft.result import finished_run
from prunepeft.run import check
from prunepeft.state import RunFolder, read_json, write_json
from prunepeft.state.lock import FolderLock

_CONTEXT = ("task", "model", "data", "budget")


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    cost: str = "both",
    output: str | Path,
    reference: str | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every method with every seed, and compare. The same call again goes on.

    A run that fails with an error of ours is recorded, and the comparison goes on.

    Args:
        config: Settings of all runs; method, seed, baseline and output are set for each.
        methods: Two at least: search methods, and `lora` or `lora-all` for plain LoRA.
        seeds: Splits, first values and order; the methods are paired by them.
        cost: `own` (each as it is set), `equal` (at the steps of the reference) or `both`.
        output: Folder of the comparison.
        reference: The method to compare with, whose steps are the allowance; default: prunepeft if
            it is among the methods, else the first that searches.
        resume: `auto`, or `never` to refuse a folder that holds a comparison.
        overwrite: Run everything again.
        dry_run: Only say what would run.
        command: For the record.
        progress: Where progress goes.
    Returns:
        The content of `compare.json`, or what would run.
    """
    output = Path(output)
    reference = reference or default_reference(methods)
    check_choice(methods, seeds, cost, reference)
    check_settings(config, methods)
    check_place(config, output, reference, resume, overwrite)
    check_sources(config, output)
    for method in methods:
        first = cell_config(config, method, seeds[0], output)
        plain_placement(first, method, seeds[0]) if method in PLAIN else make_plan(first)
    if dry_run:
        return planned(config, methods, seeds, cost, output, reference)
    join(check_device(config.device))
    with _working_in(output, settings_of(config, reference)):
        how = {"overwrite": overwrite, "command": command, "progress": progress}
        cells = _run_all(config, methods, seeds, cost, output, reference, how)
        found = _assemble(cells, reference, command)
        on_main(lambda: write_comparison(output, found))
    return found


def compare_runs(
    folders: Sequence[str | Path],
    *,
    reference: str | None = None,
    output: str | Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Compare finished runs of one task, metric and budget; nothing is trained.

    Args:
        folders: Run folders, grouped by their method and paired by their seed.
        reference: As for `compare`.
        output: Where the page goes; None: nowhere.
        command: For the record.
    """
    runs = [finished_run(folder) for folder in folders]
    check_same(runs)
    cells = [read_cell(run, method_of(run)) for run in runs]
    reference = reference or default_reference([cell.method for cell in cells])
    check_once(cells, reference)
    found = _assemble(cells, reference, command)
    if output is not None:
        check_folder(Path(output), only_page=True)
        write_comparison(Path(output), found)
    return found


def planned(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    cost: str,
    output: Path,
    reference: str,
) -> dict[str, Any]:
    """What a comparison would run, with the most steps that each run takes at its own cost."""
    runs = []
    for method in methods:
        settings = cell_config(config, "prunepeft" if method in PLAIN else method, seeds[0], output)
        found = check(settings)
        search = 0 if method in PLAIN else found["search"]["steps"]
        runs += [
            {
                "method": method,
                "seed": seed,
                "search_steps": search,
                "train_steps": found["train"]["steps"],
                "done": RunFolder(folder_of(output, method, "own", seed)).done,
            }
            for seed in seeds
        ]
    most = next(r["search_steps"] + r["train_steps"] for r in runs if r["method"] == reference)
    plan: dict[str, Any] = {"reference": reference, "output": str(output), "own": runs}
    if cost != "own":
        plan["equal"] = {"runs_at_most": (len(methods) - 1) * len(seeds), "steps_at_most": most}
    return plan


def method_of(run: RunFolder) -> str:
    """What made the placement of a run: its method, or the name of what was given to it."""
    arch = run.read_config().get("arch")
    if not arch:
        return read_json(run.result_file)["method"]
    stem = Path(arch).stem
    if stem in PLAIN:
        return stem
    inside = [p for p in Path(arch).parts[:-1] if p != "best"]
    return f"given: {inside[-1] if inside and stem == 'arch' else stem}"


@contextlib.contextmanager
def _working_in(output: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Keep other processes out of the folder, and write down what all runs share."""
    lock = FolderLock(output / ".lock")
    with contextlib.ExitStack() as held:

        def begin() -> None:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            held.callback(lock.release)
            write_json(output / SETTINGS, settings)

        on_main(begin)
        yield


def _run_all(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    cost: str,
    output: Path,
    reference: str,
    how: dict[str, Any],
) -> list[Cell]:
    """Runs at own cost, seed by seed, then those at equal cost; in the order of the methods."""
    own: dict[tuple[str, int], Cell] = {}
    for seed in seeds:
        for method in methods:
            skip = cost == "equal" and is_black_box(method) and method != reference
            own[method, seed] = (
                Cell(method, "own", seed) if skip else run_own(config, method, seed, output, **how)
            )
    order = [(m, s) for m in methods for s in seeds]
    cells = [own[key] for key in order] if cost != "equal" else []
    if cost != "own":
        equal = {
            (m, s): run_equal(config, own[m, s], own[reference, s], output, **how)
            for s in seeds
            for m in methods
        }
        cells += [equal[key] for key in order]
    return cells


def _assemble(cells: Sequence[Cell], reference: str, command: str) -> dict[str, Any]:
    """The comparison, with what all runs have in common."""
    done = next((cell for cell in cells if cell.metric is not None), None)
    if done is None:
        raise StateError(
            f"all {len(cells)} runs failed; the first one with: {cells[0].error} Put that right "
            "and run the same command again."
        )
    result = read_json(RunFolder(done.run).result_file)
    context = {name: result[name] for name in _CONTEXT}
    context["budget"] = {k: v for k, v in context["budget"].items() if k != "realised"}
    context["data"] = {"source": result["data"]["source"]}
    found = make_comparison(cells, reference, greater_is_better=result["task"]["greater_is_better"])
    return {
        **found,
        **context,
        "metric": result["metric"]["name"],
        "prunepeft_version": result["prunepeft_version"],
        "command": command,
    }
