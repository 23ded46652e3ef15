"""LoRAPrune: heads and neurons of the base model are masked step by step while LoRA trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from prunepeft.errors import ConfigError, StateError
from prunepeft.schedules import held_cubic
from prunepeft.structured.base_criteria import BaseCriterion, LoraGuided
from prunepeft.structured.cut import WHAT, Cut, check_ratio, choose_units
from prunepeft.structured.groups import Group
from prunepeft.structured.masks import Masks
from prunepeft.structured.scoring import Scorer

SKIP_LAYERS = ("none", "paper")


@dataclass(frozen=True)
class _State:
    """What a pass has found so far."""

    step: int = 0
    refreshes: int = 0
    done: bool = False
    cut: Cut = field(default_factory=Cut)
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class GradualPruner:
    """A watcher that prunes along a schedule by a moving average of scores.

    In optimiser step t of T the scores s of all groups enter I <- decay I + (1 - decay) s. Every
    `every` steps the share ratio * held_cubic(t / T) of the units of least I is masked, rounded
    down; what is masked stays masked. The first step of the cool-down masks exactly the target,
    rounded half up, and the modules train on with these masks.

    Attributes:
        groups: The groups of the base model, of `find_groups` on the plain model.
        ratios: Share of the units to mask by "heads" and "neurons", each in [0, 1).
        criterion: What judges the units.
        every: Optimiser steps from one refresh of the masks to the next.
        decay: Of the moving average, in [0, 1).
        warmup: Share of the steps before the first refresh.
        cooldown: Share of the steps after the last one.
        scope: By "heads" and "neurons": "layer" (the same number in every group; the default) or
            "global" (one ranking over all groups).
        skip_layers: "none", so that widths stay uniform, or "paper": the first floor(0.1 L) layers
            and the last of each stack keep everything. A group tied over layers is never skipped.
        one_shot: Score to the end without a mask, then mask the target at once (for comparison).
    Raises:
        ConfigError: if a setting is not allowed, or nothing would be pruned.
    References:
        LoRAPrune, 2024, arXiv 2305.18403. Differs from released code: the target is
        met exactly (there, one unit less goes); a layer whose scores are not finite is left out of
        that step alone; scores are taken before gradients are clipped; a unit of grouped-query
        attention is a key-value head with its query heads; the state can be saved.
    """

    groups: Sequence[Group]
    ratios: Mapping[str, float] = field(default_factory=lambda: {"heads": 0.5, "neurons": 0.5})
    criterion: BaseCriterion = field(default_factory=LoraGuided)
    every: int = 10
    decay: float = 0.9
    warmup: float = 0.1
    cooldown: float = 0.1
    scope: Mapping[str, str] = field(default_factory=dict)
    skip_layers: str = "none"
    one_shot: bool = False
    _steps: int = field(default=0, init=False)
    _state: _State = field(default_factory=_State, init=False)
    _marked: _State = field(default_factory=_State, init=False)
    _masks: Masks | None = field(default=None, init=False)
    _scorer: Scorer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _check(self)
        exempt = _exempt(self.groups) if self.skip_layers == "paper" else set()
        wanted = {what for what, ratio in self.ratios.items() if ratio > 0}
        self.pruned = tuple(g for g in self.groups if g.what in wanted and g.id not in exempt)
        for what in sorted(wanted):
            check_ratio(self.pruned, what, self.ratios[what])
        if not self.pruned:
            raise ConfigError(
                f"no ratio is above 0 (got {dict(self.ratios)}), so nothing would be pruned. "
                "Give ratios={'heads': 0.5, 'neurons': 0.5}, or one of them."
            )

    @property
    def config(self) -> dict[str, Any]:
        """Everything the result depends on, as JSON."""
        own = ("every", "decay", "warmup", "cooldown", "skip_layers", "one_shot")
        return {
            "watcher": "gradual_pruner",
            "criterion": {"name": self.criterion.name} | asdict(self.criterion),
            "ratios": dict(sorted(self.ratios.items())),
            "scope": {what: self.scope.get(what, "layer") for what in WHAT},
            "groups": {g.id: g.n_units for g in self.groups},
        } | {name: getattr(self, name) for name in own}

    # --- Watcher ---------------------------------------------------------------------------

    def attach(self, net: PeftModel) -> None:
        """Put masks of ones on the writers of all groups to prune; nothing new trains."""
        base = net.base_model.model
        self._masks = Masks(base, self.pruned)
        self._scorer = Scorer(base, self.pruned, self.criterion, net=net)
        self._state = _State()
        self.mark()

    def start(self, steps: int) -> None:
        """Begin to score; `steps` optimiser steps are to come, in all."""
        if steps < 1:
            raise ConfigError(f"steps must be 1 or more; got {steps!r}.")
        self._steps = steps
        self._parts()[1].start()

    def mark(self) -> None:
        """Remember the state."""
        self._marked = self._state

    def reset(self) -> None:
        """Go back to the state of the last mark."""
        masks, scorer = self._parts()
        scorer.clear()
        self._state = self._marked
        masks.show(self._state.cut)

    def step(self) -> None:
        """Take in the scores of one optimiser step, and refresh the masks when they are due."""
        scorer = self._parts()[1]
        if not self._steps:
            raise StateError("step() was called before start(steps); call start() first.")
        scores = scorer.scores()
        scorer.clear()
        s = self._state
        ema, skipped = dict(s.ema), dict(s.skipped)
        for group, new in scores.items():
            old = ema.get(group, torch.zeros_like(new)).to(new.device)
            # On the device, so that no step waits for it.
            usable = torch.isfinite(new).all()
            ema[group] = torch.where(usable, self.decay * old + (1 - self.decay) * new, old)
            skipped[group] = skipped.get(group, torch.zeros(())).to(new.device) + ~usable
        self._state = replace(s, step=s.step + 1, ema=ema, skipped=skipped)
        done = held_cubic(min(1.0, (s.step + 1) / self._steps), self.warmup, self.cooldown)
        if self.one_shot or s.done:
            return
        if done == 1.0:
            self._finish()
        elif done > 0.0 and (s.step + 1) % self.every == 0:
            self._refresh(self._partial(done), False)

    def stop(self) -> dict[str, Tensor]:
        """Take masks and hooks off.

        Returns:
            On the CPU: `ema.<group id>` and `mask.<group id>` (n_units,), the mask 1 for kept and 0
            for gone; `skipped.<group id>`, steps whose scores were not finite; `steps` and
            `refreshes`.
        """
        try:
            if not self._state.done:
                self._finish()
            found = self.state_dict()
        finally:
            self.abandon()
        found.pop("done")
        return found

    def abandon(self) -> None:
        """Take masks and hooks off, after an error too."""
        if self._scorer is not None:
            self._scorer.stop()
        if self._masks is not None:
            self._masks.remove()
        self._masks, self._scorer, self._steps = None, None, 0

    # --- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The state between two steps as CPU tensors; `load_state_dict` takes it back."""
        s, masks = self._state, self._parts()[0]
        numbers = {"steps": s.step, "refreshes": s.refreshes, "done": int(s.done)}
        shown = {group: masks[group] for group in masks}
        tables = {"ema": s.ema, "mask": shown, "skipped": s.skipped}
        return {k: torch.tensor(v) for k, v in numbers.items()} | {
            f"{name}.{group}": tensor.detach().to("cpu", torch.float32, copy=True)
            for name, table in tables.items()
            for group, tensor in table.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state, after `attach`.

        Raises:
            StateError: if it was saved with other groups.
        """
        masks = self._parts()[0]
        sizes = {f"mask.{g.id}": g.n_units for g in self.pruned}
        saved = {k: len(t) for k, t in state.items() if k.startswith("mask.")}
        if saved != sizes:
            raise StateError(
                f"the saved state is of {len(saved)} groups, this pruner has {len(sizes)}, or they "
                "are of other sizes; load it into a pruner with the settings and the model it was "
                "saved with."
            )
        ema, skipped = (
            {k.removeprefix(name): t.clone() for k, t in state.items() if k.startswith(name)}
            for name in ("ema.", "skipped.")
        )
        step, refreshes = int(state["steps"]), int(state["refreshes"])
        cut = cut_of(state, self.pruned)
        self._state = _State(step, refreshes, bool(state["done"]), cut, ema, skipped)
        self.mark()
        masks.show(cut)

    # --- masks -----------------------------------------------------------------------------

    def _parts(self) -> tuple[Masks, Scorer]:
        if self._masks is None or self._scorer is None:
            raise StateError("the pruner is on no model; call attach(net) first.")
        return self._masks, self._scorer

    def _importance(self) -> dict[str, Tensor]:
        """The moving average; below everything where a unit is masked, so that it stays so."""
        ema, masks = self._state.ema, self._parts()[0]
        if not ema:
            raise StateError("no step was scored; call step() after each backward pass.")
        return {g: torch.where(masks[g].cpu() > 0, ema[g].cpu(), -1.0) for g in masks}

    def _finish(self) -> None:
        """Mask the target exactly."""
        self._refresh(choose_units(self.pruned, self._importance(), self.ratios, self.scope), True)

    def _partial(self, done: float) -> Cut:
        """What is masked when this share of the pruning is done, whole units only."""
        importance, keep = self._importance(), {}
        for group in self.pruned:
            is_global = self.scope.get(group.what) == "global"
            ranked = [g for g in self.pruned if g.what == group.what] if is_global else [group]
            n = sum(g.n_units for g in ranked)
            gone = math.floor(n * self.ratios[group.what] * done + 1e-9)
            if gone and group.id not in keep:
                share = {group.what: gone / n}
                keep |= choose_units(ranked, importance, share, self.scope).keep
        return _cut(self.pruned, keep)

    def _refresh(self, cut: Cut, done: bool) -> None:
        self._state = replace(self._state, refreshes=self._state.refreshes + 1, done=done, cut=cut)
        self._parts()[0].show(cut)


def cut_of(tensors: Mapping[str, Tensor], groups: Sequence[Group]) -> Cut:
    """The cut that the masks of `GradualPruner.stop()` say.

    Args:
        tensors: What `stop()` returned.
        groups: The groups of the model; those without a mask keep everything.
    """
    masks = {g.id: tensors[f"mask.{g.id}"] for g in groups if f"mask.{g.id}" in tensors}
    keep = {i: tuple(mask.nonzero().flatten().tolist()) for i, mask in masks.items()}
    return _cut(groups, keep)


def _cut(groups: Sequence[Group], keep: Mapping[str, tuple[int, ...]]) -> Cut:
    return Cut(keep, {g.id: g.n_units for g in groups if g.id in keep})


def _exempt(groups: Sequence[Group]) -> set[str]:
    """Groups of the first floor(0.1 L) layers and the last layer of their stack."""
    n_layers = {
        s: 1 + max(g.layer for g in groups if g.stack == s) for s in {g.stack for g in groups}
    }
    single = [g for g in groups if ".*." not in g.id]
    ends = {s: (math.floor(0.1 * n + 1e-9), n - 1) for s, n in n_layers.items()}
    return {g.id for g in single if g.layer < ends[g.stack][0] or g.layer == ends[g.stack][1]}


def _check(pruner: GradualPruner) -> None:
    """Raise ConfigError for settings that are not allowed."""
    held_cubic(0.0, pruner.warmup, pruner.cooldown)
    choose_units((), {}, pruner.ratios, pruner.scope)  # names and ranges
    if pruner.skip_layers not in SKIP_LAYERS:
        raise ConfigError(
            f"skip_layers must be one of {', '.join(SKIP_LAYERS)}; got {pruner.skip_layers!r}."
        )
    if isinstance(pruner.every, bool) or not isinstance(pruner.every, int) or pruner.every < 1:
        raise ConfigError(f"every must be a whole number of 1 or more; got {pruner.every!r}.")
    if not 0.0 <= pruner.decay < 1.0:
        raise ConfigError(f"decay must be in [0, 1); got {pruner.decay!r}.")
