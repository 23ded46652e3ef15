"""`prunepeft decompress`: a compressed adapter as an ordinary one."""

from pathlib import Path
from typing import Annotated

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, Verbose, make_output


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("decompress", epilog="Example: prunepeft decompress small --output adapter")(
        guarded("decompress", decompress)
    )


def decompress(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `prunepeft compress` made.", metavar="DIR")
    ],
    output: Annotated[Path, typer.Option(help="Adapter folder to make.")],
    start: Annotated[
        Path | None, typer.Option(help="The --start folder it was compressed with, if any.")
    ] = None,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a compressed adapter as an adapter folder that plain peft loads."""
    out = make_output(json_out, verbose, quiet)
    with out.work():
        from prunepeft.compression import decompress_adapter

        report = decompress_adapter(folder, output, snapshot=start)
    if not out.document(report):
        out.mapping("", report)
