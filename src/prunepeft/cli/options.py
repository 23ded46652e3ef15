"""Flags that commands share, and the one signature of `check`, `search` and `train`."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.output import Output
from prunepeft.errors import ConfigError

if TYPE_CHECKING:
    from prunepeft.config import RunConfig

_RUN, _LOOK = "Run", "Output"
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.", rich_help_panel=_LOOK)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=_LOOK)]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="Say more.", rich_help_panel=_LOOK)
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.", rich_help_panel=_LOOK)]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")]
Model = Annotated[str | None, typer.Option(help="Folder or hub id.")]
Data = Annotated[str | None, typer.Option(help="File, folder or hub id.")]
Budget = Annotated[str | None, typer.Option(help="0.5%, 120k, 1.2M, '12 modules' or rank:64.")]
Kinds = Annotated[str | None, typer.Option(help="E.g. lora,serial_adapter.")]
Task = Annotated[str | None, typer.Option(help="See `prunepeft ls tasks`.")]
Metric = Annotated[str | None, typer.Option(help="See `prunepeft ls metrics`.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_RUN)]
Precision = Annotated[str | None, typer.Option(help="auto, fp32 or bf16.", rich_help_panel=_RUN)]
Quantize = Annotated[str | None, typer.Option(help="none, 8bit or 4bit.", rich_help_panel=_RUN)]
PrefixCache = Annotated[
    str | None,
    typer.Option(
        "--prefix-cache-gb",
        help="Disk for the output of frozen layers; 0: off.",
        rich_help_panel=_RUN,
    ),
]
Backend = Annotated[str | None, typer.Option(help="serial, process or ray.", rich_help_panel=_RUN)]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start anew and replace all.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would run.", rich_help_panel=_RUN)
]
Offline = Annotated[bool, typer.Option("--offline", help="No network.", rich_help_panel=_RUN)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=_RUN),
]


class Resume(StrEnum):
    """What to do with the state of an interrupted run."""

    AUTO = "auto"
    NEVER = "never"


ResumeFlag = Annotated[
    Resume, typer.Option(help="Go on where an interrupted run ended.", rich_help_panel=_RUN)
]


@dataclass(frozen=True)
class Switches:
    """How to run, beside the configuration."""

    resume: str
    overwrite: bool
    dry_run: bool
    command: str


Body = Callable[["RunConfig", Switches, Output], None]


def add_run_command(
    app: typer.Typer,
    name: str,
    body: Body,
    text: str,
    examples: str,
    short: Mapping[str, str] | None = None,
) -> None:
    """Add a command that takes a configuration: YAML file, `key=value` overrides and flags.

    `short` maps keys as this command calls them to those of the configuration.
    """
    keys = dict(short or {})

    def command(
        arguments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="CONFIG.yaml KEY=VALUE",
                help="YAML file (see `prunepeft init`) and settings such as train.lr=1e-4.",
            ),
        ] = None,
        model: Model = None,
        data: Data = None,
        budget: Budget = None,
        kinds: Kinds = None,
        task: Task = None,
        metric: Metric = None,
        method: Annotated[str | None, typer.Option(help="See `prunepeft ls methods`.")] = None,
        baseline: Annotated[str | None, typer.Option(help="none, lora or lora-all.")] = None,
        output: Annotated[str | None, typer.Option(help="Run folder.")] = None,
        seed: Annotated[str | None, typer.Option(help="Whole number from 0.")] = None,
        device: Device = None,
        precision: Precision = None,
        quantize: Quantize = None,
        backend: Backend = None,
        prefix_cache_gb: PrefixCache = None,
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
        flags = {
            "model": model,
            "data": data,
            "budget": budget,
            "kinds": kinds,
            "task": task,
            "metric": metric,
            keys.get("method", "method"): method,
            "baseline": baseline,
            "output": output,
            "seed": seed,
            "device": device,
            "precision": precision,
            "quantize": quantize,
            "backend": backend,
            "train.prefix_cache_gb": prefix_cache_gb,
            "offline": offline or None,
            "trust_remote_code": trust_remote_code or None,
        }
        config = read_config([_renamed(a, keys) for a in arguments or []], flags)
        switches = Switches(resume.value, overwrite, dry_run, command_line())
        body(config, switches, make_output(json_out, verbose, quiet))

    command.__doc__ = text
    app.command(name, epilog=examples)(guarded(name, command))


def read_config(arguments: list[str], flags: dict[str, Any]) -> "RunConfig":
    """The configuration from positional arguments and flags.

    Raises:
        ConfigError: for more than one file, or anything `load_config` refuses.
    """
    from prunepeft.config import load_config

    files = [arg for arg in arguments if is_config_file(arg)]
    if len(files) > 1:
        raise ConfigError(
            f"got {len(files)} configuration files ({', '.join(files)}); give one, "
            "and settings as key=value."
        )
    overrides = [arg for arg in arguments if arg not in files]
    config = load_config(files[0] if files else None, overrides, flags)
    if config.offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    return config


def _renamed(argument: str, keys: Mapping[str, str]) -> str:
    """`ratio=0.3` as the configuration calls it, where a command has a short name for a key."""
    key, equals, value = argument.partition("=")
    return keys.get(key.strip(), key) + equals + value if equals else argument


def is_config_file(argument: str) -> bool:
    """Whether a positional argument names a file rather than a `key=value` setting."""
    return "=" not in argument or (argument.endswith((".yaml", ".yml")) and Path(argument).exists())


def make_output(json_out: bool, verbose: int = 0, quiet: bool = False) -> Output:
    """The output these flags ask for."""
    return Output(json_out=json_out, verbosity=-1 if quiet else verbose)


def command_line() -> str:
    """The command as typed, for the record of the run."""
    import shlex

    return shlex.join(["prunepeft", *sys.argv[1:]])


def existing_run(path: Path) -> Path:
    """Return `path` if it is a run folder.

    Raises:
        ConfigError: if it is not.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no run folder {path}; give the --output of a finished search.")
    if not (path / "config.yaml").exists() and not (path / "result.json").exists():
        raise ConfigError(
            f"{path} is not a run folder (it has neither config.yaml nor result.json); "
            "give the --output of a finished search."
        )
    return path
