"""What every process of the data-parallel test does; the test itself calls it for one process.

python -m torch.distributed.run --nproc_per_node 2 parallel_driver.py MODEL DATA OUT [JOB]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import prunepeft
from prunepeft import IstCallback, IstSettings, run
from prunepeft.config import load_config
from prunepeft.criteria.record import Recorder
from prunepeft.engine import Engine
from prunepeft.errors import ConfigError
from prunepeft.plan import make_plan
from prunepeft.processes import join, on_main, share
from prunepeft.state import RunFolder
from prunepeft.supernet import trainable_state
from tests.tiny_models import TINY

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
    found = {
        "weights": trainable_state(net),
        "abs_grad_mean": record.abs_grad_mean,
        "output_abs_mean": record.output_abs_mean,
        "loss": log.loss,
        "steps": log.steps,
        "metrics": engine.phases.evaluate(net),
    }
    engine.phases.run(net, engine.phases.train, optimizer, scheduler, 6)
    return found | {"later_weights": trainable_state(net)}


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


def ist_results(model: str, data: str, out: Path, processes: int = 1) -> dict[str, Any]:
    """What IST learns, in a training of ours with recomputed activations and in a user's own."""
    settings = IstSettings(every=2, probe_rows=8, score_lr=1e3)
    flat = {"model": model, "data": data, "budget": "100%", "output": str(out), "device": "cpu"}
    flat |= {"train.gradient_checkpointing": True, "train.epochs": 2, "train.lr": 1e-3}
    plan = make_plan(load_config(None, (), flat | EVEN))
    is_main = processes == 1 or torch.distributed.get_rank() == 0
    engine = Engine(plan, RunFolder(out), is_main=is_main)
    seen: list[dict[str, Any]] = []
    engine.evaluator.on_event = lambda kind, **fields: seen.append(fields)
    outcome = engine.evaluator.train(plan.space.full(), name="ist", seed=1, ist=settings)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    net = get_peft_model(TINY["bert"](num_hidden_layers=4), config)
    callback = IstCallback(settings)
    args = TrainingArguments(
        str(out),
        max_steps=8,
        optim="sgd",
        average_tokens_across_devices=False,  # else BERT's mean loss counts once per process
        learning_rate=0.1,
        per_device_train_batch_size=8 // processes,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": torch.arange(i, i + 6) + 3, "labels": i % 3} for i in range(32)]
    Trainer(model=net, args=args, train_dataset=rows, callbacks=[callback]).train()
    return {
        "weights": engine.evaluator.weights(outcome),
        "importance": seen[-1]["importance"],
        "own": trainable_state(net),
        "own_importance": callback.importance,
    }


def ist(model: str, data: str, out: Path) -> None:
    join("cpu")
    found = ist_results(model, data, out / "run", processes=2)
    torch.save(found, out / f"rank{torch.distributed.get_rank()}.pt")


def searches(model: str, data: str, out: Path) -> None:
    """One search after another, with the settings that the test left."""
    for settings in json.loads((out / "settings.json").read_text("utf-8")):
        run.search(load_config(None, (), settings))


def search_and_fail(model: str, data: str, out: Path) -> None:
    """A search in which one process that is not the main one breaks down in training."""
    from prunepeft.training.phase_trainer import PhaseTrainer

    original = PhaseTrainer.compute_loss

    def break_down(self: PhaseTrainer, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("one process broke down")
        return original(self, *args, **kwargs)

    PhaseTrainer.compute_loss = break_down
    prunepeft.search(model, data, budget="800", output=str(out / "run"), device="cpu")


if __name__ == "__main__":
    job = {"FAIL": search_and_fail, "IST": ist, "SEARCH": searches}.get(
        " ".join(sys.argv[4:]), main
    )
    job(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
