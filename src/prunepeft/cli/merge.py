"""`prunepeft merge`: several adapters of the same modules as one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prunepeft.cli.compress import print_report
from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, Verbose, make_output
from prunepeft.errors import ConfigError


class Method(StrEnum):
    """How task vectors are merged."""

    TIES = "ties"
    SUM = "sum"
    AVERAGE = "average"


def add(app: typer.Typer) -> None:
    """Add the command."""
    example = "Example: prunepeft merge small-a small-b --method ties --output merged"
    app.command("merge", epilog=example)(guarded("merge", merge))


def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Adapter folders, compressed ones or run folders.", metavar="A B ..."),
    ],
    output: Annotated[Path, typer.Option(help="Adapter folder to make.")],
    method: Annotated[
        Method, typer.Option(help="ties: elect signs; sum: task arithmetic; average.")
    ] = Method.TIES,
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, e.g. 0.7,0.3; default 1 each.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor of what is merged.")] = 1.0,
    trim: Annotated[
        float | None,
        typer.Option(help="Share that ties keeps of adapters not compressed before; default 0.2."),
    ] = None,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge adapters of the same modules by what training added to them."""
    out = make_output(json_out, verbose, quiet)
    numbers = _numbers(weights)
    with out.work():
        from prunepeft.compression import merge_adapters

        report = merge_adapters(
            adapters, output, method=method.value, weights=numbers, scale=scale, trim=trim
        )
    print_report(out, report)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights must be numbers with commas, e.g. 0.7,0.3; got {text!r:.80}."
        ) from None
