"""What BIPEFT knows between two optimiser steps, and how it prunes: no model, only numbers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunepeft.kinds import seeded
from prunepeft.strategies import bipeft_rules as rules

Moments = tuple[Tensor, Tensor, int]
MAX_PRUNE_STEPS = 100
_NOISE = 1e-3  # standard deviation of the first logits
_LAST = 10  # fires in which every module that is there counts whole, however likely it is drawn


@dataclass(frozen=True)
class State:
    """After so many optimiser steps; N modules, up to C candidate dimensions.

    Attributes:
        presence: Logits of absent and present, (N, 2).
        dimension: Logits, (N, C).
        presence_moments, dimension_moments: Of Adam, each with its count of steps.
        sensitivity: Smoothed, (N,).
        removed: 0 for a module that is there, else its place among those removed, (N,).
        frozen: Index of the dimension that a module is held at, (N,); -1: not held.
        left: Fires left.
        step: Optimiser steps so far.
        products: w dL/dw of the last step that trained the weights, by module and tensor, each
            divided by the number of the module's parameters.
        selections: The latest selections.
        history: Logits of the dimensions, minus infinity where there is no candidate.
        fires: See `BipeftSearch`.
    """

    presence: Tensor
    dimension: Tensor
    presence_moments: Moments
    dimension_moments: Moments
    sensitivity: Tensor
    removed: Tensor
    frozen: Tensor
    left: int
    step: int = 0
    products: tuple[list[Tensor], ...] = ()
    selections: tuple[Tensor, ...] = ()
    history: tuple[Tensor, ...] = ()
    fires: tuple[tuple[float, ...], ...] = ()

    @property
    def kept(self) -> Tensor:
        return self.removed == 0

    @property
    def best(self) -> Tensor:
        """Index of every module's dimension outside of the steps that search for it, (N,)."""
        return torch.where(self.frozen >= 0, self.frozen, self.dimension.argmax(-1))


@dataclass(frozen=True, eq=False)
class Pruning:
    """When modules go and dimensions are held.

    Attributes:
        costs: Of every candidate, (N, C); 0 where a module has fewer.
        budget: What is left may cost.
        fires: Fires in which the budget is reached.
        begin: Pairs of steps before the first of them.
        threshold: Mean cosine of selections from which it fires.
        window: Selections compared, and entries of the history that stay after a fire.
        decay: Of the smoothed sensitivity.
    """

    costs: Tensor
    budget: int
    fires: int
    begin: int
    threshold: float
    window: int
    decay: float

    def first(self, seed: int) -> State:
        """The state before the first step: of every module the largest dimension is the best."""
        n, c = self.costs.shape
        draw = seeded(seed, "logits")
        presence, dimension = (
            _NOISE * torch.randn(n, k, generator=draw, dtype=torch.float64) for k in (2, c)
        )
        exists = self.costs > 0
        dimension = dimension.masked_fill(~exists, torch.inf).sort(-1).values
        dimension = dimension.masked_fill(~exists, -torch.inf)
        zeros = [torch.zeros(n, k, dtype=torch.float64) for k in (2, c)]
        return State(
            presence,
            dimension,
            (zeros[0], zeros[0], 0),
            (zeros[1], zeros[1], 0),
            sensitivity=torch.zeros(n, dtype=torch.float64),
            removed=torch.zeros(n, dtype=torch.long),
            frozen=torch.where(exists.sum(1) > 1, -1, 0),
            left=self.fires,
        )

    def judged(self, state: State, importance: Tensor) -> State:
        """After a pair of steps: smooth the sensitivities (N,), and prune if selections agree."""
        sensitivity = self.decay * state.sensitivity + (1 - self.decay) * importance
        sensitivity = torch.where(state.kept, sensitivity, state.sensitivity)
        costs = self.costs.gather(1, state.best[:, None])[:, 0]
        candidates = torch.where(state.kept, costs, torch.inf)
        now = rules.select(sensitivity, candidates, self.budget)
        state = replace(state, sensitivity=sensitivity, history=(*state.history, state.dimension))
        settled = rules.is_settled(state.selections, now, self.threshold, self.window)
        if state.left and settled and (state.step + 1) // 2 > self.begin:
            state = self._fired(state)
        return replace(state, selections=(*state.selections, now)[-self.window :])

    def expected(self, state: State) -> Tensor:
        """Expected cost of every module, (N,); 0 for those removed."""
        counts = state.left > _LAST
        presence = torch.softmax(state.presence, -1)[:, 1] if counts else None
        cost = rules.expected_costs(state.dimension, self.costs, state.frozen, presence)
        return cost * state.kept

    def _fired(self, state: State) -> State:
        expected = self.expected(state)
        before = float(expected.sum())
        target = (before - self.budget) / state.left
        gone = rules.removals(state.sensitivity, expected, state.kept, target)
        removed = state.removed.clone()
        for i in gone:
            removed[i] = int(removed.max()) + 1
        left = state.left - 1
        history = torch.stack(state.history)
        frozen = rules.newly_frozen(history, state.frozen, removed == 0, left)
        held = int((frozen != state.frozen).sum())
        new = replace(
            state,
            removed=removed,
            frozen=frozen,
            left=left,
            history=state.history[-self.window :],
        )
        after = float((expected * (removed == 0)).sum())
        fire = (state.step + 1.0, before, after, float(len(gone)), float(held))
        return replace(new, fires=(*state.fires, fire))
