"""`prunepeft inspect`: what is in a run, an adapter or a placement."""

from pathlib import Path
from typing import Annotated

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, Verbose, make_output
from prunepeft.errors import ConfigError


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect", epilog="Example: prunepeft inspect runs/a/best/adapter")(
        guarded("inspect", inspect)
    )


def inspect(
    path: Annotated[Path, typer.Argument(help="Run folder, adapter folder or arch.json.")],
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show kept modules, sizes, parameters and who can serve them."""
    output = make_output(json_out, verbose, quiet)
    if not path.exists():
        raise ConfigError(f"there is nothing at {path}; give a run, an adapter or an arch.json.")
    with output.work():
        from prunepeft.report import format_inspect, inspect_path

        found = inspect_path(path)
    if not output.document(found):
        output.line(format_inspect(found))
