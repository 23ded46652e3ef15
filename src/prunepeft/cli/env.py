"""`prunepeft env`: versions, threads and devices, for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from prunepeft._version import __version__
from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, make_output

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env", epilog="Example: prunepeft env --json")(guarded("env", env))


def env(json_out: Json = False, debug: Debug = False) -> None:
    """Show versions, threads and devices."""
    output = make_output(json_out)
    with output.work():
        found = environment()
    if not output.document(found):
        output.mapping("", found)


def environment() -> dict[str, Any]:
    """What this process would compute with."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "prunepeft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": names or ["cpu"],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
