"""The backend of a run, from its settings."""

import os
from pathlib import Path

import torch

from prunepeft.backends.base import Backend, Serial
from prunepeft.backends.processes import Processes, visible_devices
from prunepeft.backends.ray_actors import RayActors, check_ray
from prunepeft.backends.worker import Build
from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError
from prunepeft.progress import Progress

WORKERS = 2


def check_backend(config: RunConfig, *, has_trials: bool) -> None:
    """Raise an error if the backend cannot do what is asked, before anything is trained.

    Args:
        config: The settings.
        has_trials: Whether the method trains placements that do not depend on each other.
    """
    if config.backend == "serial":
        return
    if not has_trials or config.arch is not None:
        what = f"method {config.method}" if config.arch is None else "training a given arch"
        raise ConfigError(
            f"{what} has no independent trials, so backend={config.backend} has nothing to run "
            "side by side; leave backend out, or use a black-box method such as method=random."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"backend={config.backend} runs trials in processes of its own, and torchrun has "
            "started several already; use backend=serial under torchrun, or start one process."
        )
    if config.backend == "ray":
        check_ray()


def make_backend(config: RunConfig, build: Build, progress: Progress, log: Path) -> Backend:
    """The backend of these settings; `build` makes the evaluator of a worker.

    Args:
        config: The settings; `device` is `cpu` or `cuda`.
        build: A function that can be sent to another process.
        progress: Where progress goes.
        log: File for what worker processes print.
    """
    if config.backend == "serial":
        return Serial()
    workers, cuda = config.workers or WORKERS, config.device == "cuda"
    threads = n_threads(workers)
    if config.backend == "process":
        return Processes(build, workers, threads, progress, cuda=cuda, log=log)
    gpus = 1.0 if cuda else 0.0
    if cuda and config.ray_address is None:  # workers share the devices that are there
        gpus = min(1.0, len(visible_devices()) / workers)
    return RayActors(build, workers, threads, progress, address=config.ray_address, gpus=gpus)


def n_threads(workers: int) -> int:
    """Threads of torch in each of so many workers: a fair share, and not more than here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(torch.get_num_threads(), (cores or 1) // workers))
