"""Evaluator that trains with the transformers Trainer on one base model, loaded once."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.budget import Fidelity
from prunepeft.criteria.base import needs_of, score_units
from prunepeft.criteria.record import Recorder
from prunepeft.data import subset
from prunepeft.errors import StateError
from prunepeft.evaluate import Outcome, Scored
from prunepeft.processes import on_main, share
from prunepeft.resumable import Resumable
from prunepeft.space import Placement
from prunepeft.state import Journal, call_key
from prunepeft.supernet import attach, detach, load_trainable_state, n_trainable, trainable_state
from prunepeft.training import Phases, derive_seed, make_optimizer, make_scheduler, n_steps


@dataclass(frozen=True)
class Target:
    """What is trained towards.

    Attributes:
        metric: Name of the metric that decides.
        greater_is_better: Its direction.
        head: Names of modules trained in full.
        task_type: peft task type.
        stratify: Whether subsets of the rows keep the shares of the labels.
        search_lr: Learning rate while searching.
        context: Everything else a result depends on (model, data, settings), for its key.
    """

    metric: str
    greater_is_better: bool
    head: list[str]
    task_type: str | None
    stratify: bool
    search_lr: float
    context: Mapping[str, Any]


class TrainerEvaluator:
    """Modules are put on the base model and taken off in place; it is never loaded again.

    Every finished call is kept in the journal, so a search that was killed replays its calls and
    repeats at most the one that was running; training resumes at its last finished epoch.

    Args:
        model: The base model with its task head.
        phases: How to train and evaluate.
        target: What to train towards.
        journal: Where finished calls are kept.
        state_dir: Where a training under way is kept.
        writes: Whether this process writes (the main one does).
        on_event: Told of each epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Phases,
        target: Target,
        journal: Journal,
        state_dir: Path,
        *,
        writes: bool = True,
        on_event: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        self.model = model
        self.phases = phases
        self.target = target
        self.journal = journal
        self.state_dir = state_dir
        self.writes = writes
        self.on_event = on_event
        self._held: dict[str, dict[str, Tensor]] = {}

    def score(
        self,
        placement: Placement,
        criteria: tuple[str, ...],
        *,
        name: str,
        fidelity: Fidelity,
        seed: int,
        init_seed: int,
        start: str = "",
        keep: bool = False,
    ) -> Scored:
        """See `Evaluator.score`."""
        call = self._call("score", placement, criteria=sorted(criteria), fidelity=asdict(fidelity))
        call |= {"seeds": [seed, init_seed], "start": start, "keep": keep}
        key = call_key(call)
        if (found := on_main(lambda: self.journal.get(key))) is not None:
            return Scored(**found)
        rows = self._rows(fidelity, seed)
        net = self.attach(placement, init_seed)
        if start:
            load_trainable_state(net, self._tensors(start), strict=False)
        logs, saliency = self._record(net, rows, criteria, fidelity.epochs, name, seed)
        result = Scored(
            saliency=saliency,
            key=key,
            loss=logs[-1].loss,
            seconds=sum(log.seconds for log in logs),
            steps=sum(log.steps for log in logs),
            rows=len(rows),
            peak_memory_bytes=max(log.peak_memory_bytes for log in logs),
        )
        tensors = trainable_state(net) if keep else None
        detach(net)
        result = self._remember(key, call, result, tensors)
        self.phases.progress.finish(f"loss {result.loss:.3f}")
        return result

    def train(
        self, placement: Placement, *, name: str, seed: int, lr: float | None = None
    ) -> Outcome:
        """Train a placement from its first values for all epochs; the best epoch is kept.

        Args:
            placement: What to train.
            name: For the progress line.
            seed: First values, order and dropout.
            lr: Learning rate instead of the settings'.
        """
        lr = self.phases.settings.lr if lr is None else lr
        epochs = self.phases.settings.epochs
        call = self._call("train", placement, seed=seed, lr=lr, epochs=epochs)
        key = call_key(call)
        if (found := on_main(lambda: self.journal.get(key))) is not None:
            if self.writes:  # a run killed after its entry was written still has its state
                self._state_file(key).unlink(missing_ok=True)
            return Outcome(**found)
        net = self.attach(placement, derive_seed(seed, "train-init"))
        run = self._train(net, key, name, seed, lr)
        own, head = n_trainable(net)
        detach(net)
        result = Outcome(
            metrics=run.best_metrics,
            best_epoch=run.best_epoch,
            curve=run.curve,
            n_params=own,
            head_params=head,
            key=key,
            **run.cost,
        )
        result = self._remember(key, call, result, run.best)
        if self.writes:
            run.clear()
        self.phases.progress.finish(
            f"{self.target.metric} {result.metrics[self.target.metric]:.4f}"
        )
        return result

    def weights(self, outcome: Outcome) -> dict[str, Tensor]:
        """Best weights of a finished training, by parameter name."""
        return self._tensors(outcome.key)

    def attach(
        self, placement: Placement, seed: int = 0, weights: Mapping[str, Tensor] | None = None
    ) -> PeftModel:
        """The base model with the placement on it, fresh or with these weights."""
        net = attach(
            self.model,
            placement,
            seed=seed,
            modules_to_save=self.target.head or None,
            task_type=self.target.task_type,
        )
        if weights is not None:
            load_trainable_state(net, weights)
        return net

    def _record(
        self,
        net: PeftModel,
        rows: Dataset,
        criteria: tuple[str, ...],
        epochs: int,
        name: str,
        seed: int,
    ) -> tuple[list[Any], dict[str, dict[str, float]]]:
        """Train for some epochs; the statistics are those of the last one."""
        settings = self.phases.settings
        steps = n_steps(len(rows), settings.batch_size) * epochs
        self.phases.progress.start(name, steps)
        optimizer = make_optimizer(net, settings, self.target.search_lr)
        scheduler = make_scheduler(optimizer, settings, steps)
        logs = []
        with Recorder.for_net(net, needs_of(criteria)) as recorder:
            for epoch in range(1, epochs + 1):
                recorder.reset()
                phase_seed = derive_seed(seed, "epoch", epoch)
                logs.append(self.phases.run(net, rows, optimizer, scheduler, phase_seed, recorder))
            return logs, score_units(recorder.read(), criteria)

    def _train(self, net: PeftModel, key: str, name: str, seed: int, lr: float) -> Resumable:
        settings, target, rows = self.phases.settings, self.target, self.phases.train
        steps = n_steps(len(rows), settings.batch_size)
        optimizer = make_optimizer(net, settings, lr)
        scheduler = make_scheduler(optimizer, settings, steps * settings.epochs)
        file = self._state_file(key)
        run = Resumable(net, optimizer, scheduler, file, target.metric, target.greater_is_better)
        done = run.load()
        self.phases.progress.start(name, steps * (settings.epochs - done))
        for epoch in range(done + 1, settings.epochs + 1):
            phase_seed = derive_seed(seed, "train", epoch)
            log = self.phases.run(net, rows, optimizer, scheduler, phase_seed)
            entry = run.after_epoch(epoch, log, self.phases.evaluate(net))
            self.on_event("epoch", name=name, **entry)
            if self.writes:
                run.save(epoch)
        return run

    def _state_file(self, key: str) -> Path:
        return self.state_dir / f"train-{key}.safetensors"

    def _rows(self, fidelity: Fidelity, seed: int) -> Dataset:
        train = self.phases.train
        if fidelity.data >= 1:
            return train
        n = max(1, round(fidelity.data * len(train)))
        return subset(train, n, seed, "labels" if self.target.stratify else None)

    def _call(self, what: str, placement: Placement, **more: Any) -> dict[str, Any]:
        return {
            "what": what,
            "placement": placement.digest,
            "context": dict(self.target.context),
            **more,
        }

    def _remember(
        self, key: str, call: dict[str, Any], result: Any, tensors: dict[str, Tensor] | None
    ) -> Any:
        """Keep a result, and return it as the main process has it.

        Processes other than the main one hold the weights they may need later.
        """
        if self.writes:
            self.journal.put(key, call, asdict(result), tensors=tensors)
        else:
            self._held[key] = tensors or {}
        return share(result)

    def _tensors(self, key: str) -> dict[str, Tensor]:
        tensors = self._held.get(key) or self.journal.get_tensors(key)
        if tensors is None:
            raise StateError(
                f"the weights of run {key} are gone from {self.journal.folder}; run again."
            )
        return tensors
