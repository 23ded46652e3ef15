"""The table of commands and the way in. Nothing heavy is imported before a command runs."""

import sys
from typing import Annotated, NoReturn

import typer

from prunepeft._version import __version__
from prunepeft.cli import (
    check,
    compare,
    compress,
    decompress,
    env,
    eval,
    export,
    init,
    inspect,
    ls,
    merge,
    prune_base,
    report,
    schema,
    search,
    train,
)
from prunepeft.cli.exits import report_usage

COMMANDS = (
    *(init, check, search, compare, prune_base, train, eval, export),
    *(compress, decompress, merge, inspect, report, ls, env, schema),
)
# The parent of BadParameter is click's UsageError, in whichever copy typer brings along.
_UsageError = typer.BadParameter.__mro__[1]

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or settings, 3 data, 4 budget, 5 out of memory, 6 disk, "
    "7 run folder locked, 130/143 interrupted with the state saved, 1 internal error."
)

app = typer.Typer(
    name="prunepeft",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    command.add(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunepeft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Find out which PEFT modules a task needs under a budget, and train only those."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    given = sys.argv[1:] if args is None else args
    try:
        code = app(given, standalone_mode=False, prog_name="prunepeft")
    except _UsageError as error:
        code = report_usage(error, given)
    except typer.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
