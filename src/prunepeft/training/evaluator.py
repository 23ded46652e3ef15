"""Evaluator that trains with the transformers Trainer on one base model, loaded once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.batches import derive_seed, n_steps
from prunepeft.budget import Fidelity
from prunepeft.criteria.watch import SaliencyWatcher
from prunepeft.errors import StateError
from prunepeft.evaluate import Outcome, Scored, Target, Tried, Watched, Watcher
from prunepeft.probes import Probe
from prunepeft.space import Placement
from prunepeft.sparse_tuning import IstSettings
from prunepeft.state import Journal, call_key
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import find_groups
from prunepeft.supernet import attach, detach, load_trainable_state, trainable_state
from prunepeft.training.brief import cost_of, measure_briefly, rows_at, train_briefly
from prunepeft.training.calibration import BasePasses
from prunepeft.training.full import first_seed, outcome_of, train_fully
from prunepeft.training.phases import Phases
from prunepeft.training.takeover import cut_and_keep, cut_and_merge
from prunepeft.training.trial_cache import TrialCache
from prunepeft.training.trials import FOUND, Trials


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
        cache: Trials that runs share.
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
        cache: TrialCache | None = None,
    ) -> None:
        self.model = model
        self.phases = phases
        self.target = target
        self.trials = Trials(journal, target.context, writes=writes, cache=cache)
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
        settle: float | None = None,
    ) -> Scored:
        """See `Evaluator.score`."""
        call = self.trials.call(
            "score", placement, criteria=sorted(criteria), fidelity=asdict(fidelity)
        )
        call |= {"seeds": [seed, init_seed], "start": start, "keep": keep, "settle": settle}
        key = call_key(call)
        if (found := self.trials.find(key)) is not None:
            return Scored(**found)
        rows = rows_at(self.phases, self.target, fidelity, seed)
        watcher = SaliencyWatcher(criteria, settle, fidelity.epochs)
        with self._training(placement, init_seed, rows, fidelity.epochs, name) as net:
            if start:
                load_trainable_state(net, self.trials.weights(start), strict=False)
            logs, _ = train_briefly(
                net, self.phases, self.target, rows, fidelity.epochs, name, seed, watcher
            )
            tensors = trainable_state(net) if keep else None
        result = Scored(saliency=watcher.saliency, key=key, **cost_of(logs, rows))
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
            with self._attached(placement, init_seed) as net:
                logs, found = train_briefly(
                    net, self.phases, self.target, rows, fidelity.epochs, name, seed, watcher
                )
                tensors = {FOUND + n: t for n, t in found.items()} | trainable_state(net)
            cost = self.trials.keep(key, call, {"key": key, **cost_of(logs, rows)}, tensors)
            self.phases.progress.finish(f"loss {cost['loss']:.3f}")
        return Watched(tensors=self.trials.found(key), **cost)

    def calibrate(self, probe: Probe, *, name: str, fidelity: Fidelity, seed: int) -> Watched:
        """See `Evaluator.calibrate`."""
        call = self.trials.call("calibrate", Placement(), probe=probe.config)
        call |= {"fidelity": asdict(fidelity), "seed": seed}
        key = call_key(call)
        cost = self.trials.find(key)
        if cost is None:
            rows = rows_at(self.phases, self.target, fidelity, seed)
            passes = BasePasses(
                self.model, self.phases, self.target, rows, fidelity.epochs, name, seed
            )
            found, spent = passes.run(probe)
            tensors = {FOUND + n: t for n, t in found.items()}
            cost = self.trials.keep(key, call, {"key": key, **spent}, tensors)
            self.phases.progress.finish(f"{cost['steps']} steps")
        return Watched(tensors=self.trials.found(key), **cost)

    def trial(self, placement: Placement, *, name: str, fidelity: Fidelity, seed: int) -> Tried:
        """See `Evaluator.trial`."""
        if (kept := self.find_trial(placement, fidelity=fidelity, seed=seed)) is not None:
            return kept
        key = call_key(self._trial(placement, fidelity, seed))
        rows = rows_at(self.phases, self.target, fidelity, seed)
        first = derive_seed(seed, "trial-init")
        training = self._training(placement, first, rows, fidelity.epochs, name)
        found = measure_briefly(
            training, self.phases, self.target, rows, fidelity.epochs, name, seed
        )
        tried = Tried(key=key, **found)
        result = self.keep_trial(placement, tried, fidelity=fidelity, seed=seed)
        metric = self.target.metric
        self.phases.progress.finish(result.error or f"{metric} {result.metrics[metric]:.4f}")
        return result

    def find_trial(self, placement: Placement, *, fidelity: Fidelity, seed: int) -> Tried | None:
        """The result of a trial that was run before, here or in a run that shares its trials."""
        call = self._trial(placement, fidelity, seed)
        found = self.trials.find_trial(call_key(call), call)
        return None if found is None else Tried(**found)

    def keep_trial(
        self, placement: Placement, tried: Tried, *, fidelity: Fidelity, seed: int
    ) -> Tried:
        """Keep the result of a trial, wherever it was run.

        Raises:
            StateError: if model (its path or hub id, not its weights), data or settings differ.
        """
        call = self._trial(placement, fidelity, seed)
        key = call_key(call)
        if tried.key not in ("", key):  # none if no worker lived to give it
            raise StateError(
                "a worker trains on another model or other data than the main process; they must "
                "be the same on every machine, and stay as they are while a search runs."
            )
        return self.trials.keep_trial(key, call, replace(tried, key=key))

    def _trial(self, placement: Placement, fidelity: Fidelity, seed: int) -> dict[str, Any]:
        return self.trials.call("trial", placement, fidelity=asdict(fidelity), seed=seed)

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
        ist: IstSettings | None = None,
    ) -> Outcome:
        """Train a placement for all epochs; the best epoch is kept.

        Args:
            placement: What to train.
            name: For the progress line.
            seed: First values, order and dropout.
            lr: Learning rate instead of the settings'.
            start: Key of weights to go on from, instead of first values.
            ist: Train a few layers in each step; None trains all.
        """
        lr = self.phases.settings.lr if lr is None else lr
        epochs = self.phases.settings.epochs
        call = self.trials.call("train", placement, seed=seed, lr=lr, epochs=epochs)
        call |= ({"start": start} if start else {}) | ({"ist": asdict(ist)} if ist else {})
        key = call_key(call)
        if (found := self.trials.find(key)) is not None:
            if self.writes:  # a run killed after its entry was written still has its state
                self._state_file(key).unlink(missing_ok=True)
            return Outcome(**found)
        with self._training(placement, first_seed(seed), self.phases.train, epochs, name) as net:
            if start:
                load_trainable_state(net, self.trials.weights(start))
            how = {"seed": seed, "lr": lr, "ist": ist}
            how |= {"writes": self.writes, "on_event": self.on_event}
            file = self._state_file(key)
            run = train_fully(net, self.phases, self.target, file, name, **how)
            result = self.trials.keep(key, call, outcome_of(run, net, key), run.best)
        if self.writes:
            run.clear()
        metric = self.target.metric
        self.phases.progress.finish(f"{metric} {result.metrics[metric]:.4f}")
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

    @contextlib.contextmanager
    def _attached(self, placement: Placement, seed: int) -> Iterator[PeftModel]:
        """`attach`, and all is off again afterwards, after an error too."""
        net = self.attach(placement, seed)
        try:
            yield net
        finally:
            detach(net)

    @contextlib.contextmanager
    def _training(
        self, placement: Placement, seed: int, rows: Dataset, epochs: int, name: str
    ) -> Iterator[PeftModel]:
        """The same for a training: frozen layers need not run, or the model is compiled."""
        steps = n_steps(len(rows), self.phases.settings.batch_size) * epochs
        with self._attached(placement, seed) as net, self.phases.reusing(net, rows, epochs, name):
            with self.phases.compiling(net, steps):
                yield net

    def _state_file(self, key: str) -> Path:
        return self.state_dir / f"train-{key}.safetensors"
