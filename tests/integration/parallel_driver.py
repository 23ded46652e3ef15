"""What every process of the data-parallel test does; the test itself calls it for one process.

python -m torch.distributed.run --nproc_per_node 2 parallel_driver.py MODEL DATA OUT [FAIL]
"""

import sys
from pathlib import Path
from typing import Any

import torch

import prunepeft
from prunepeft.config import load_config
from prunepeft.criteria.record import Recorder
from prunepeft.engine import Engine
from prunepeft.errors import ConfigError
from prunepeft.plan import make_plan
from prunepeft.processes import join, on_main, share
from prunepeft.state import RunFolder
from prunepeft.supernet import trainable_state

EVEN = {"train.batch_size": 8, "train.max_grad_norm": 1e9, "search.warmup": False}
UNEVEN = EVEN | {"train.batch_size": 7, "train.gradient_accumulation": 2}


def one_epoch(model: str, data: str, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Weights after an epoch of gradient descent, whose steps show the size of the gradients."""
    flat = {"model": model, "data": data, "budget": "100%", "output": str(out), "device": "cpu"}
    plan = make_plan(load_config(None, (), flat | settings))
    engine = Engine(plan, RunFolder(out), is_main=False)
    net = engine.evaluator.attach(plan.space.full(), 1)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with Recorder.for_net(net) as recorder:
        log = engine.phases.run(net, engine.phases.train, optimizer, scheduler, 5, recorder)
        record = recorder.read()
    return {
        "weights": trainable_state(net),
        "abs_grad_mean": record.abs_grad_mean,
        "output_abs_mean": record.output_abs_mean,
        "loss": log.loss,
        "steps": log.steps,
        "metrics": engine.phases.evaluate(net),
    }


def results(model: str, data: str, out: Path) -> dict[str, Any]:
    return {
        name: one_epoch(model, data, out, settings)
        for name, settings in (("even", EVEN), ("uneven", UNEVEN))
    }


def main(model: str, data: str, out: Path) -> None:
    is_main = join("cpu")
    rank = torch.distributed.get_rank()
    found = results(model, data, out)
    assert share(rank) == 0
    try:
        on_main(lambda: fail_on_purpose(rank))
    except ConfigError as error:
        found["error"] = f"{error} caught by {rank}"
    torch.save(found, out / f"rank{rank}.pt")
    assert is_main == (rank == 0)


def fail_on_purpose(rank: int) -> None:
    raise ConfigError(f"raised by {rank}")


def search_and_fail(model: str, data: str, out: Path) -> None:
    """A search in which one process that is not the main one breaks down in training."""
    from prunepeft.phase_trainer import PhaseTrainer

    original = PhaseTrainer.compute_loss

    def break_down(self: PhaseTrainer, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("one process broke down")
        return original(self, *args, **kwargs)

    PhaseTrainer.compute_loss = break_down
    prunepeft.search(model, data, budget="800", output=str(out / "run"), device="cpu")


if __name__ == "__main__":
    job = search_and_fail if sys.argv[4:] == ["FAIL"] else main
    job(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
