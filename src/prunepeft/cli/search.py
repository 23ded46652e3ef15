"""`prunepeft search`: the main job, from a model and data to a trained adapter."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from prunepeft.cli.check import print_plan
from prunepeft.cli.options import Switches, add_run_command
from prunepeft.cli.output import Output

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

EXAMPLES = (
    "Examples: prunepeft search run.yaml budget=0.1%  |  "
    "prunepeft search --model ./m --data train.jsonl --budget 0.1% --output runs/a   "
    "See also: check, report, export."
)


def add(app: typer.Typer) -> None:
    """Add the command."""
    text = "Find the modules the task needs under the budget, train them and prove them."
    add_run_command(app, "search", search, text, EXAMPLES)


def search(config: "RunConfig", switches: Switches, output: Output) -> None:
    """Search, retrain, evaluate and write the run folder."""
    run_and_print("search", config, switches, output)


def run_and_print(
    name: str,
    config: "RunConfig",
    switches: Switches,
    output: Output,
    summary: Callable[[dict[str, Any], "RunConfig"], str] | None = None,
) -> None:
    """Call `prunepeft.run.<name>` and print its plan or result, by default that of a search."""
    with output.work(chatty=True):
        from prunepeft import run
        from prunepeft.cli.progress import make_progress

        result = getattr(run, name)(
            config,
            resume=switches.resume,
            overwrite=switches.overwrite,
            dry_run=switches.dry_run,
            command=switches.command,
            progress=make_progress(output),
        )
    if switches.dry_run:
        print_plan(result, output)
    elif not output.document(result):
        output.line((summary or _summary)(result, config))


def _summary(result: dict[str, Any], config: "RunConfig") -> str:
    from prunepeft.places import output_of
    from prunepeft.report import compact_summary

    return compact_summary(result, output_of(config))
