"""The training of what was found: all epochs, saved after each, perhaps a few layers at a time."""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from prunepeft.batches import derive_seed, n_steps
from prunepeft.evaluate import Outcome, Target
from prunepeft.sparse_tuning import IstSettings, SparseTuning
from prunepeft.supernet import n_trainable
from prunepeft.training.phases import Phases, make_optimizer, make_scheduler
from prunepeft.training.resumable import Resumable


def first_seed(seed: int) -> int:
    """Seed of the first values of modules that `TrainerEvaluator.train` trains with this seed."""
    return derive_seed(seed, "train-init")


def train_fully(
    net: PeftModel,
    phases: Phases,
    target: Target,
    file: Path,
    name: str,
    *,
    seed: int,
    lr: float,
    ist: IstSettings | None = None,
    writes: bool = True,
    on_event: Callable[..., None] = lambda kind, **fields: None,
) -> Resumable:
    """Train for the epochs of the settings, or those left of a training that was interrupted.

    Args:
        net: The model with modules on it.
        phases: How to train and evaluate, and the rows.
        target: What to train towards.
        file: Where the training is kept while it is under way.
        name: For the progress line.
        seed: Order and dropout.
        lr: Peak learning rate.
        ist: Train a few layers in each step; None trains all.
        writes: Whether this process writes the file.
        on_event: Told of each epoch.
    """
    settings, rows = phases.settings, phases.train
    steps = n_steps(len(rows), settings.batch_size)
    optimizer = make_optimizer(net, settings, lr)
    scheduler = make_scheduler(optimizer, settings, steps * settings.epochs)
    tuning = None
    if ist is not None:
        tuning = SparseTuning(net, ist, derive_seed(seed, "ist"), rows, phases.collator)
    judged = target.metric, target.greater_is_better
    run = Resumable(net, optimizer, scheduler, file, *judged, tuning)
    done = run.load()
    phases.progress.start(name, steps * (settings.epochs - done))
    for epoch in range(done + 1, settings.epochs + 1):
        if tuning is not None:
            tuning.mark()
        phase_seed = derive_seed(seed, "train", epoch)
        log = phases.run(net, rows, optimizer, scheduler, phase_seed, tuning)
        on_event("epoch", name=name, **run.after_epoch(epoch, log, phases.evaluate(net)))
        if tuning is not None:
            on_event("ist", name=name, epoch=epoch, importance=tuning.importance)
        if writes:
            run.save(epoch)
    return run


def outcome_of(run: Resumable, net: PeftModel, key: str) -> Outcome:
    """What a finished training of a net came to, under its name in the journal."""
    own, head = n_trainable(net)
    return Outcome(
        metrics=run.best_metrics,
        best_epoch=run.best_epoch,
        curve=run.curve,
        n_params=own,
        head_params=head,
        key=key,
        **run.cost,
    )
