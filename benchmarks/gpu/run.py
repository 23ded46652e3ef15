"""Everything worth knowing of a machine with a GPU, within nine minutes.

    python -m benchmarks.gpu.run --results FOLDER

Runs the GPU halves of the other suites one after the other, the most telling first, each in a
process of its own and none beyond the time that is left; what did not fit or failed is said in the
summary. Copy the folder to `benchmarks/gpu/results` and commit it. `--device cpu` is a rehearsal
without a GPU: small shapes, to see that everything runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import commit, machine
from prunepeft.state import write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: In the summary.
        command: Module and arguments; `{results}` is the folder.
        seconds: What it takes, about; it does not start with less time left.
    """

    name: str
    command: tuple[str, ...]
    seconds: int


def jobs(device: str) -> list[Job]:
    """The most telling first."""
    where = ("--device", device, "--results", "{results}")
    small = device == "cpu"
    large = ("tiny",) if small else ("llama-7b",)
    pairs = "2" if small else "7"
    return [
        Job("large", ("benchmarks.gpu.large", *where), 120),
        Job("step", ("benchmarks.engine.run", "--only", "step", *where), 40),
        Job("prefix", ("benchmarks.engine.run", "--only", "prefix", *where), 60),
        Job("sparse", ("benchmarks.sparse_tuning.cost", "--pairs", pairs, *where), 120),
        Job(
            "structured",
            ("benchmarks.structured.speed", "--only", *large, "--pairs", pairs, *where),
            120,
        ),
        Job("quantized", ("benchmarks.gpu.large", "--only", "8bit", "4bit", *where), 60),
        Job("compiled", ("benchmarks.gpu.large", "--only", "compiled", *where), 90),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where files go")
    parser.add_argument("--seconds", type=float, default=530, help="for everything together")
    parser.add_argument("--only", nargs="*", default=[], help="names of jobs")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    summary: dict[str, Any] = {"commit": commit(), "machine": machine(), "jobs": {}}
    for job in jobs(args.device):
        if args.only and job.name not in args.only:
            continue
        left = end - time.monotonic()
        summary["jobs"][job.name] = (
            run(job, args.results, left)
            if left > job.seconds or args.device == "cpu"
            else {"state": "no time", "left": round(left)}
        )
        print(job.name, summary["jobs"][job.name]["state"], flush=True)
        write_json(args.results / f"summary-{args.device}.json", summary)
    print(json.dumps({name: found["state"] for name, found in summary["jobs"].items()}))


def run(job: Job, results: Path, left: float) -> dict[str, Any]:
    """Run a job for the time that is left; its last lines if it failed."""
    command = [part.format(results=results) for part in job.command]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=max(1.0, left),
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        return {"state": "stopped", "seconds": round(time.monotonic() - began, 1)}
    state = "done" if done.returncode == 0 else "failed"
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
    return found if done.returncode == 0 else found | {"error": done.stderr[-2000:]}


if __name__ == "__main__":
    main()
