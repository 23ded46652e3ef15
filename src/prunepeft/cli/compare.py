"""`prunepeft compare`: which search is worth its cost on this task."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import (
    Budget,
    Data,
    Debug,
    Device,
    DryRun,
    Json,
    Kinds,
    Metric,
    Model,
    Offline,
    Overwrite,
    Precision,
    Quantize,
    Quiet,
    Resume,
    ResumeFlag,
    Task,
    TrustRemoteCode,
    Verbose,
    command_line,
    make_output,
    read_config,
)
from prunepeft.cli.output import Output
from prunepeft.errors import ConfigError

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

EXAMPLES = (
    "Examples: prunepeft compare run.yaml --methods prunepeft,random,smam,lora-all --seeds 0,1,2 "
    "--output runs/cmp  |  prunepeft compare runs/a runs/b   See also: search, ls methods."
)
_PLAIN = ("lora", "lora-all")


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare", epilog=EXAMPLES)(guarded("compare", compare))


def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml KEY=VALUE | RUN RUN",
            help="Settings as for search; or folders of finished runs, and nothing is trained.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="See `prunepeft ls methods`; also lora and lora-all.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Whole numbers; default 0,1,2.")] = None,
    cost: Annotated[
        str | None, typer.Option(help="own, equal (compute) or both; default both.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Method to compare with; default prunepeft, else the first search."),
    ] = None,
    model: Model = None,
    data: Data = None,
    budget: Budget = None,
    kinds: Kinds = None,
    task: Task = None,
    metric: Metric = None,
    output: Annotated[str | None, typer.Option(help="Folder of the comparison.")] = None,
    device: Device = None,
    precision: Precision = None,
    quantize: Quantize = None,
    resume: ResumeFlag = Resume.AUTO,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    json_out: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run several methods with several seeds at equal budgets, and say what the numbers show."""
    flags = {
        "model": model,
        "data": data,
        "budget": budget,
        "kinds": kinds,
        "task": task,
        "metric": metric,
        "output": output,
        "device": device,
        "precision": precision,
        "quantize": quantize,
        "offline": offline or None,
        "trust_remote_code": trust_remote_code or None,
    }
    out = make_output(json_out, verbose, quiet)
    given = arguments or []
    if runs := [Path(a) for a in given if Path(a).is_dir()]:
        others = {"cost": cost, "overwrite": overwrite or None, "dry-run": dry_run or None}
        others |= {"resume": None if resume is Resume.AUTO else resume}
        others |= {**flags, "output": None, "methods": methods, "seeds": seeds}
        _check_only_runs(given, others)
        return _compare_runs(runs, reference, Path(output or "runs/compare"), out)
    names = _listed(methods)
    config = _config(given, flags, names)
    place = Path(config.output or f"runs/{Path(config.data).stem or 'data'}-compare")
    how = {"resume": resume.value, "overwrite": overwrite, "dry_run": dry_run}
    how |= {"cost": cost or "both", "reference": reference, "output": place}
    _compare(config, names, _numbers(seeds), how, out)


def _compare(
    config: "RunConfig",
    methods: Sequence[str],
    seeds: Sequence[int],
    how: dict[str, Any],
    output: Output,
) -> None:
    with output.work(chatty=True):
        from prunepeft.cli.progress import make_progress
        from prunepeft.compare import compare as run_compare

        found = run_compare(
            config, methods, seeds, **how, command=command_line(), progress=make_progress(output)
        )
    if not how["dry_run"]:
        return _show(found, how["output"], output)
    if not output.document(found):
        output.mapping("", found)
        output.line("Nothing was trained. The same command without --dry-run starts it.")


def _compare_runs(runs: list[Path], reference: str | None, place: Path, output: Output) -> None:
    with output.work():
        from prunepeft.compare import compare_runs

        found = compare_runs(runs, reference=reference, output=place, command=command_line())
    _show(found, place, output)


def _show(found: dict[str, Any], place: Path, output: Output) -> None:
    if not output.document(found):
        from prunepeft.report import comparison_summary

        output.line(comparison_summary(found, place))


def _config(arguments: list[str], flags: dict[str, Any], methods: Sequence[str]) -> "RunConfig":
    """The shared settings; sections that one method alone may have are read with that method."""
    error: ConfigError | None = None
    for method in [m for m in methods if m not in _PLAIN] or ["prunepeft"]:
        try:
            return read_config(arguments, {**flags, "method": method})
        except ConfigError as found:
            error = error or found
    raise error


def _listed(text: str | None) -> list[str]:
    if not text:
        raise ConfigError(
            "methods are missing; give two at least, such as --methods prunepeft,random,lora-all, "
            "or folders of finished runs."
        )
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None) -> list[int]:
    parts = (text if text is not None else "0,1,2").split(",")
    try:
        return [int(part) for part in parts if part.strip()]
    except ValueError:
        raise ConfigError(
            f"seeds are {text!r}; give whole numbers with commas, such as --seeds 0,1,2."
        ) from None


def _check_only_runs(arguments: list[str], others: dict[str, Any]) -> None:
    """Raise ConfigError if folders of runs come with settings."""
    wrong = [a for a in arguments if not Path(a).is_dir()]
    wrong += [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"folders of finished runs are compared as they are, so {wrong[0]} says nothing here; "
            "give folders alone, or a configuration alone."
        )
