"""Evaluator that trains with the transformers Trainer on one base model, loaded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from prunepeft.brief_training import cost_of, measure_briefly, rows_at, train_briefly
from prunepeft.budget import Fidelity
from prunepeft.criteria.watch import SaliencyWatcher
from prunepeft.evaluate import Outcome, Scored, Target, Tried, Watched, Watcher
from prunepeft.resumable import Resumable
from prunepeft.space import Placement
from prunepeft.state import Journal, call_key
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import find_groups
from prunepeft.supernet import attach, detach, load_trainable_state, n_trainable, trainable_state
from prunepeft.takeover import cut_and_keep, cut_and_merge
from prunepeft.training import Phases, derive_seed, make_optimizer, make_scheduler, n_steps
from prunepeft.trials import FOUND, Trials


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
        self.trials = Trials(journal, target.context, writes=writes)
        self.state_dir = state_dir
        self.writes = writes
        self.on_event = on_event

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
        call = self.trials.call(
            "score", placement, criteria=sorted(criteria), fidelity=asdict(fidelity)
        )
        call |= {"seeds": [seed, init_seed], "start": start, "keep": keep}
        key = call_key(call)
        if (found := self.trials.find(key)) is not None:
            return Scored(**found)
        rows = rows_at(self.phases, self.target, fidelity, seed)
        net = self.attach(placement, init_seed)
        if start:
            load_trainable_state(net, self.trials.weights(start), strict=False)
        watcher = SaliencyWatcher(criteria)
        logs, _ = train_briefly(
            net, self.phases, self.target, rows, fidelity.epochs, name, seed, watcher
        )
        result = Scored(saliency=watcher.saliency, key=key, **cost_of(logs, rows))
        tensors = trainable_state(net) if keep else None
        detach(net)
        result = self.trials.keep(key, call, result, tensors)
        self.phases.progress.finish(f"loss {result.loss:.3f}")
        return result

    def watch(
        self,
        placement: Placement,
        watcher: Watcher,
        *,
        name: str,
        fidelity: Fidelity,
        seed: int,
        init_seed: int,
    ) -> Watched:
        """See `Evaluator.watch`."""
        call = self.trials.call(
            "watch", placement, watcher=watcher.config, fidelity=asdict(fidelity)
        )
        key = call_key(call | {"seeds": [seed, init_seed]})
        cost = self.trials.find(key)
        if cost is None:
            rows = rows_at(self.phases, self.target, fidelity, seed)
            net = self.attach(placement, init_seed)
            logs, found = train_briefly(
                net, self.phases, self.target, rows, fidelity.epochs, name, seed, watcher
            )
            tensors = {FOUND + n: t for n, t in found.items()} | trainable_state(net)
            detach(net)
            cost = self.trials.keep(key, call, {"key": key, **cost_of(logs, rows)}, tensors)
            self.phases.progress.finish(f"loss {cost['loss']:.3f}")
        return Watched(tensors=self.trials.found(key), **cost)

    def trial(self, placement: Placement, *, name: str, fidelity: Fidelity, seed: int) -> Tried:
        """See `Evaluator.trial`."""
        call = self.trials.call("trial", placement, fidelity=asdict(fidelity), seed=seed)
        key = call_key(call)
        if (found := self.trials.find(key)) is not None:
            return Tried(**found)
        rows = rows_at(self.phases, self.target, fidelity, seed)
        net = self.attach(placement, derive_seed(seed, "trial-init"))
        try:
            found = measure_briefly(
                net, self.phases, self.target, rows, fidelity.epochs, name, seed
            )
        finally:
            detach(net)
        result = self.trials.keep(key, call, Tried(key=key, **found))
        metric = self.target.metric
        self.phases.progress.finish(result.error or f"{metric} {result.metrics[metric]:.4f}")
        return result

    def carry(
        self,
        placement: Placement,
        key: str,
        cut: Cut | None,
        keep_ranks: Mapping[str, Sequence[int]],
    ) -> tuple[Placement, str]:
        """See `Evaluator.carry`."""
        groups = find_groups(self.model) if cut else ()
        net = self.attach(placement, weights=self.trials.weights(key))
        kept, tensors = cut_and_keep(net, groups, cut, keep_ranks)
        call = {"what": "carry", "from": key, "placement": kept.digest}
        call |= {"cut": cut and cut.digest, "ranks": {i: list(r) for i, r in keep_ranks.items()}}
        new_key = call_key(call)
        self.trials.keep(new_key, call, {}, tensors)
        self.trials.base_is(cut=cut and cut.digest)
        return kept, new_key

    def merge(self, placement: Placement, key: str, cut: Cut | None) -> None:
        """See `Evaluator.merge`."""
        groups = find_groups(self.model) if cut else ()
        net = self.attach(placement, weights=self.trials.weights(key))
        cut_and_merge(net, groups, cut)
        self.trials.base_is(cut=cut and cut.digest, merged=key)

    def train(
        self,
        placement: Placement,
        *,
        name: str,
        seed: int,
        lr: float | None = None,
        start: str = "",
    ) -> Outcome:
        """Train a placement for all epochs; the best epoch is kept.

        Args:
            placement: What to train.
            name: For the progress line.
            seed: First values, order and dropout.
            lr: Learning rate instead of the settings'.
            start: Key of weights to go on from, instead of first values.
        """
        lr = self.phases.settings.lr if lr is None else lr
        epochs = self.phases.settings.epochs
        call = self.trials.call("train", placement, seed=seed, lr=lr, epochs=epochs)
        call |= {"start": start} if start else {}
        key = call_key(call)
        if (found := self.trials.find(key)) is not None:
            if self.writes:  # a run killed after its entry was written still has its state
                self._state_file(key).unlink(missing_ok=True)
            return Outcome(**found)
        net = self.attach(placement, derive_seed(seed, "train-init"))
        if start:
            load_trainable_state(net, self.trials.weights(start))
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
        result = self.trials.keep(key, call, result, run.best)
        if self.writes:
            run.clear()
        self.phases.progress.finish(
            f"{self.target.metric} {result.metrics[self.target.metric]:.4f}"
        )
        return result

    def weights(self, outcome: Outcome) -> dict[str, Tensor]:
        """Best weights of a finished training, by parameter name."""
        return self.trials.weights(outcome.key)

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
