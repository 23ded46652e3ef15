"""`prunepeft report`: write the report of a run again."""

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, RunFolder, Verbose, existing_run, make_output


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report", epilog="Example: prunepeft report runs/a")(guarded("report", report))


def report(
    run: RunFolder,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write tables, pictures, HTML and model card from the record of a run."""
    output = make_output(json_out, verbose, quiet)
    folder = existing_run(run)
    with output.work():
        from prunepeft.report import write_report

        written = write_report(folder)
    if not output.document({"report": str(written)}):
        output.line(str(written))
