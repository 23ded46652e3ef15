"""`prunepeft export`: the adapter in the form another tool reads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, RunFolder, Verbose, existing_run, make_output


class Format(StrEnum):
    """Forms of an exported adapter."""

    PEFT = "peft"
    SERVE = "serve"
    MERGED = "merged"
    AXOLOTL = "axolotl"
    TRL = "trl"


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", epilog="Example: prunepeft export runs/a --format serve")(
        guarded("export", export)
    )


def export(
    run: RunFolder,
    format: Annotated[
        Format,
        typer.Option(
            help="peft: compact; serve: LoRA for serving engines; merged: whole model; "
            "axolotl, trl: snippets."
        ),
    ] = Format.PEFT,
    output: Annotated[
        Path | None, typer.Option(help="Target folder; default RUN/exports/FORMAT.")
    ] = None,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the adapter of a run for another tool, and check what was written."""
    out = make_output(json_out, verbose, quiet)
    folder = existing_run(run)
    with out.work():
        from prunepeft.supernet.export import export_run

        written = export_run(folder, format.value, output)
    if not out.document(written):
        out.mapping("", written)
