"""`prunepeft schema`: the JSON schema of a configuration."""

import json

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("schema", epilog="Example: prunepeft schema > prunepeft.schema.json")(
        guarded("schema", schema)
    )


def schema(json_out: Json = False, debug: Debug = False) -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from prunepeft.config import config_schema

    print(json.dumps(config_schema(), indent=2))
