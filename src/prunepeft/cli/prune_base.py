"""`prunepeft prune-base`: a smaller frozen model, as an ordinary model folder."""

from typing import TYPE_CHECKING, Any

import typer

from prunepeft.cli.options import Switches, add_run_command
from prunepeft.cli.output import Output
from prunepeft.cli.search import run_and_print

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

EXAMPLES = (
    "Examples: prunepeft prune-base run.yaml ratio=0.3 method=loraprune  |  "
    "prunepeft prune-base --model ./m --data train.jsonl ratio=0.3 --output runs/small   "
    "Then: prunepeft search --model runs/small/base ...   See also: search (base_ratio), ls."
)
SHORT = {"ratio": "base_ratio", "method": "base.method"}


def add(app: typer.Typer) -> None:
    """Add the command."""
    text = "Remove attention heads and feed-forward neurons that the task does not need."
    add_run_command(app, "prune-base", prune_base, text, EXAMPLES, SHORT)


def prune_base(config: "RunConfig", switches: Switches, output: Output) -> None:
    """Shrink the frozen model and write it to `base/` of the run folder."""
    run_and_print("prune_base", config, switches, output, _summary)


def _summary(result: dict[str, Any], config: "RunConfig") -> str:
    from prunepeft.places import base_output_of

    base, metric = result["base"], result["metric"]
    share = 1 - base["n_params"] / base["n_params_before"]
    return (
        f"{base_output_of(config) / 'base'}: {base['n_params']:,} of {base['n_params_before']:,} "
        f"parameters ({share:.1%} removed), {metric['name']} {metric['value']:.4f}"
    )
