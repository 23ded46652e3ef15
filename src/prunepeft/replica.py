"""The evaluator of a worker: the engine of a run once more, which writes nothing."""

from pathlib import Path

from prunepeft.config import RunConfig
from prunepeft.engine import Engine
from prunepeft.plan import make_plan
from prunepeft.shrinking import shrink_base
from prunepeft.state import RunFolder
from prunepeft.training import TrainerEvaluator


def make_replica(config: RunConfig, folder: Path) -> TrainerEvaluator:
    """Load model and data as the main process did; what it has kept in its journal is read.

    A base model that the run cut is cut the same way, by the scores in the journal.

    Args:
        config: The settings of the run, with the device it found.
        folder: The run folder; on a cluster it, the model and the data have the same path on
            every node.
    """
    alone = config.model_copy(update={"backend": "serial", "cache": None})
    plan = make_plan(alone)
    engine = Engine(plan, RunFolder(folder), is_main=False)
    if plan.config.base_ratio and not plan.strategy.cuts_base:
        shrink_base(plan, engine)
    return engine.evaluator
