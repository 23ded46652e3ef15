"""The evaluator of a worker that is killed once, in the middle of a trial."""

import os
import signal
from functools import partial
from pathlib import Path

from prunepeft.config import RunConfig
from prunepeft.replica import make_replica
from prunepeft.training import TrainerEvaluator


def deadly(marker: Path) -> partial:
    """`make_replica`, but the first worker to take its second step dies in it."""
    return partial(_build, marker)


def _build(marker: Path, config: RunConfig, folder: Path) -> TrainerEvaluator:
    evaluator = make_replica(config, folder)
    progress = evaluator.phases.progress
    steps = 0

    def advance(n: int = 1) -> None:
        nonlocal steps
        steps += n
        if steps == 2 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    progress.advance = advance
    return evaluator
