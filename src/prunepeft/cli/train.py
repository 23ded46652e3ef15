"""`prunepeft train`: train a placement that is known already."""

from typing import TYPE_CHECKING

import typer

from prunepeft.cli.options import Switches, add_run_command
from prunepeft.cli.output import Output
from prunepeft.cli.search import run_and_print

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

EXAMPLES = (
    "Example: prunepeft train run.yaml arch=runs/a/best/arch.json seed=1   See also: search, eval."
)


def add(app: typer.Typer) -> None:
    """Add the command."""
    text = "Train the modules of an arch.json, without a search."
    add_run_command(app, "train", train, text, EXAMPLES)


def train(config: "RunConfig", switches: Switches, output: Output) -> None:
    """Train a given placement and write the run folder."""
    run_and_print("train", config, switches, output)
