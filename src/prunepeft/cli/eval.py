"""`prunepeft eval`: measure a finished run again, on its own or on other data."""

from typing import Annotated

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, RunFolder, Verbose, existing_run, make_output


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", epilog="Example: prunepeft eval runs/a --data test.parquet")(
        guarded("eval", evaluate)
    )


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Other data; else the run's test split, or validation.")
    ] = None,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Load the adapter of a run and measure it."""
    output = make_output(json_out, verbose, quiet)
    folder = existing_run(run)
    with output.work():
        from prunepeft.run import evaluate as evaluate_run

        result = evaluate_run(folder, data)
    if not output.document(result):
        output.mapping("", result)
