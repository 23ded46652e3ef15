"""Runs experiments once: one JSON each, finished ones are skipped, processes share the work."""

import contextlib
import hashlib
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunepeft.state import canonical_json, write_json


@dataclass(frozen=True)
class Experiment:
    """One result file.

    Attributes:
        name: File name without ending, may hold folders.
        config: Everything the result depends on; a file with another config is out of date.
        run: Makes the result.
        needs: Names of experiments whose results must be there first.
    """

    name: str
    config: dict[str, Any]
    run: Callable[[], dict[str, Any]] = field(compare=False)
    needs: tuple[str, ...] = ()


class Results:
    """A folder of result files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> dict[str, Any] | None:
        """Content of a result file, None if there is none."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def is_current(self, experiment: Experiment) -> bool:
        """Whether the experiment's result is there and was made with the same config."""
        found = self.get(experiment.name)
        return found is not None and found["config_digest"] == digest(experiment.config)

    def put(self, experiment: Experiment, result: dict[str, Any], seconds: float) -> None:
        """Write a result with where it came from."""
        file = self.folder / f"{experiment.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": experiment.name,
            "config": experiment.config,
            "config_digest": digest(experiment.config),
            "commit": commit(),
            "machine": machine(),
            "wall_seconds": round(seconds, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "result": result,
        }
        write_json(file, record)


def run_all(
    experiments: Sequence[Experiment], results: Results, claims: Path, stop_after: float
) -> bool:
    """Run what is not up to date; returns whether everything is done.

    Args:
        experiments: In the order of preference.
        results: Where results go.
        claims: Folder shared by the processes that work on the same suite.
        stop_after: Start no further experiment after so many seconds.
    """
    began = time.time()
    claims.mkdir(parents=True, exist_ok=True)
    while True:
        ready = [e for e in experiments if not results.is_current(e)]
        if not ready:
            return True
        progressed = False
        for experiment in ready:
            if time.time() - began > stop_after:
                return False
            if any(results.get(n) is None for n in experiment.needs):
                continue
            with claim(claims / experiment.name.replace("/", "--")) as mine:
                if mine and not results.is_current(experiment):
                    start = time.time()
                    print(f"[{time.strftime('%H:%M:%S')}] {experiment.name}", flush=True)
                    results.put(experiment, experiment.run(), time.time() - start)
                    progressed = True
                    break  # results may have made preferred experiments ready
        if not progressed:
            time.sleep(5)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may run it; a claim of a process that died is taken over."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = path.read_text() if path.exists() else ""
        if owner and not Path(f"/proc/{owner}").exists():
            path.unlink(missing_ok=True)
        yield False
        return
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def digest(config: dict[str, Any]) -> str:
    """Short hash of a config."""
    return hashlib.sha256(canonical_json(config)).hexdigest()[:16]


def commit() -> str:
    """The commit the code is at, with a mark if files differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src"], capture_output=True, text=True
    ).stdout.strip()
    return head.stdout.strip() + ("+" if dirty else "")


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions."""
    import peft
    import torch
    import transformers

    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
