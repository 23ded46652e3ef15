"""`prunepeft init`: a commented configuration to start from."""

from typing import Annotated

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json
from prunepeft.cli.output import Output


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init", epilog="Example: prunepeft init --task seq-cls > run.yaml")(
        guarded("init", init)
    )


def init(
    task: Annotated[
        str, typer.Option(help="seq-cls, regression, causal-lm or image-cls.")
    ] = "seq-cls",
    json_out: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented YAML configuration to stdout."""
    from prunepeft.config import template

    text = template(task)
    if not Output(json_out).document({"task": task, "yaml": text}):
        print(text, end="")
