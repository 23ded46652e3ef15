"""`prunepeft check`: what would run and what it would cost, before anything is trained."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from prunepeft.cli.options import Switches, add_run_command
from prunepeft.cli.output import Output

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

EXAMPLES = "Example: prunepeft check run.yaml budget=0.1%   See also: init, search."


def add(app: typer.Typer) -> None:
    """Add the command."""
    text = "Say what would run and what it would cost; non-zero exit on any problem."
    add_run_command(app, "check", check, text, EXAMPLES)


def check(config: "RunConfig", switches: Switches, output: Output) -> None:
    """Check settings, data, model, budget, memory and disk; train nothing."""
    with output.work():
        from prunepeft.run import check as check_run

        plan = check_run(config)
    print_plan(plan, output)


def print_plan(plan: Mapping[str, Any], output: Output) -> None:
    """Print what would run."""
    if not output.document(plan):
        output.mapping("", {k: _readable(k, value) for k, value in plan.items() if value != []})
        output.line("Nothing was trained. `prunepeft search` with the same arguments starts it.")


def _readable(key: str, value: Any) -> Any:
    return f"{value / 1e6:,.0f} MB" if key.endswith("_bytes") else value
