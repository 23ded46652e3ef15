"""`prunepeft compress`: an adapter as sparse signs and one scale, small enough to ship."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, Quiet, Verbose, make_output
from prunepeft.cli.output import Output
from prunepeft.errors import ConfigError

_TUNE = "Tuning"


class Method(StrEnum):
    """What the scale is."""

    COMPEFT = "compeft"
    STC = "stc"


class Scope(StrEnum):
    """Which tensors share a threshold and a scale."""

    AUTO = "auto"
    GLOBAL = "global"
    ROLE = "role"
    TENSOR = "tensor"


class Codec(StrEnum):
    """How the signs are stored."""

    GOLOMB = "golomb"
    BITMASK = "bitmask"


Adapter = Annotated[
    Path, typer.Argument(help="Any peft adapter folder, or a run folder.", metavar="ADAPTER")
]
OutputFolder = Annotated[Path, typer.Option(help="Folder to make.")]
Density = Annotated[
    float | None, typer.Option(help="Share of the entries to keep, in (0, 1]; default 0.2.")
]
Alpha = Annotated[float | None, typer.Option(help="Factor of the scale; default 1.")]
Tune = Annotated[
    str | None,
    typer.Option(
        help="Rows that choose density and alpha where not given: a file, or 'validation' for the "
        "validation split of the run.",
        rich_help_panel=_TUNE,
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Base model, if ADAPTER is no run.", rich_help_panel=_TUNE)
]
Task = Annotated[
    str | None,
    typer.Option(help="See `prunepeft ls tasks`, if ADAPTER is no run.", rich_help_panel=_TUNE),
]
Metric = Annotated[
    str | None,
    typer.Option(help="See `prunepeft ls metrics`, if ADAPTER is no run.", rich_help_panel=_TUNE),
]
ScaleMethod = Annotated[
    Method, typer.Option(help="compeft: spread of all values; stc: mean of those kept.")
]
SharedBy = Annotated[Scope, typer.Option(help="Tensors that share a threshold and a scale.")]
Start = Annotated[
    str,
    typer.Option(help="Values before training: auto, zeros, ones, init or an adapter folder."),
]
SignCodec = Annotated[Codec, typer.Option(help="golomb: smallest; bitmask: 2 bits an entry.")]
Heads = Annotated[
    bool, typer.Option("--heads", help="Compress task heads, too; else they stay as they are.")
]


def add(app: typer.Typer) -> None:
    """Add the command."""
    examples = (
        "Examples: prunepeft compress runs/a --density 0.1 --output small  |  "
        "prunepeft compress runs/a --tune validation --output small   See also: decompress, merge."
    )
    app.command("compress", epilog=examples)(guarded("compress", compress))


def compress(
    adapter: Adapter,
    output: OutputFolder,
    density: Density = None,
    alpha: Alpha = None,
    tune: Tune = None,
    model: Model = None,
    task: Task = None,
    metric: Metric = None,
    method: ScaleMethod = Method.COMPEFT,
    scope: SharedBy = Scope.AUTO,
    start: Start = "auto",
    codec: SignCodec = Codec.GOLOMB,
    heads: Heads = False,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress an adapter 8 to 50 times (ComPEFT). The base model is not needed, but to tune."""
    out = make_output(json_out, verbose, quiet)
    if tune is None and (model or task or metric):
        raise ConfigError("--model, --task and --metric say how to tune; give --tune DATA as well.")
    with out.work():
        from prunepeft.compression.adapter import Settings
        from prunepeft.compression.starts import STARTS
        from prunepeft.shipping import compress as ship

        is_name = start in ("auto", *STARTS)
        name = start if is_name else "snapshot"
        given = {"density": density, "alpha": alpha}
        given = {key: value for key, value in given.items() if value is not None}
        settings = Settings(
            **given, method=method.value, scope=scope.value, start=name, heads=heads
        )
        snapshot = None if is_name else start
        judge = {"tune": tune, "model": model, "task": task, "metric": metric}
        judge["fixed"] = tuple(given)
        report = ship(adapter, output, settings, codec=codec.value, snapshot=snapshot, **judge)
    print_report(out, report)


def print_report(out: Output, report: dict[str, Any]) -> None:
    """Print what was done, the notes last."""
    if out.document(report):
        return
    hidden = ("scales", "notes", "tuning")
    out.mapping("", {k: v for k, v in report.items() if k not in hidden})
    if tuning := report.get("tuning"):
        out.line(
            f"{tuning['metric']} on {tuning['rows']} rows: {tuning['before']:.4f} before, "
            f"{tuning['best']:.4f} with the best of {len(tuning['tried'])} pairs"
        )
    for note in report["notes"]:
        out.line(f"note: {note}")
