"""IST, importance-aware sparse tuning: which layers train in a step, and what they are worth.

Pan et al., 2024, arXiv 2410.11772. Nothing here knows of models: layers are numbers, trials are
sets of layers with a loss each. Every draw depends on the seed and the number of the step alone,
so scores and step are the whole state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunepeft.errors import CheckpointError, ConfigError, UnknownNameError
from prunepeft.kinds import seeded
from prunepeft.registry import unknown_name

CHOICES = {
    "reward": ("exp", "relative"),
    "sampling": ("importance", "uniform"),
    "optimizer_state": ("keep", "offload", "drop"),
}
MAX_DRAWS = 100  # of one set of layers, before the weights are given up for equal ones
SMALLEST_WEIGHT = 1e-30


@dataclass(frozen=True)
class IstSettings:
    """How layers are chosen and judged; the defaults are those of the released code.

    Attributes:
        layers: Share of the layers with modules that train in a step; at least one layer.
        suppressed: Share of the layers whose modules a trial turns down; at least one layer.
        beta: What is left of the contribution of suppressed modules; 0 hides them.
        every: Optimiser steps between two updates of the scores.
        trials: Sets of layers that are tried in an update, all different.
        score_lr: Learning rate of the scores.
        probe_rows: Training rows of the batch on which an update's trials run.
        reward: Of a trial with loss l: `exp`, e^-l as released, or `relative`, e^-(l - the
            update's least), which does not vanish where losses are large.
        sampling: `importance`, or `uniform`: no trials, all layers alike (the control RST).
        optimizer_state: Of layers that do not train: `keep`, `offload` to the memory of the host,
            or `drop`, after which moments start again from zero.
    """

    layers: float = 0.25
    suppressed: float = 0.5
    beta: float = 0.25
    every: int = 10
    trials: int = 3
    score_lr: float = 10.0
    probe_rows: int = 16
    reward: str = "exp"
    sampling: str = "importance"
    optimizer_state: str = "keep"

    def __post_init__(self) -> None:
        for name in ("layers", "suppressed"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"ist.{name} is a share in (0, 1]; got {getattr(self, name)}.")
        for name in ("every", "trials", "probe_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ist.{name} must be 1 or more; got {getattr(self, name)}.")
        if not 0 <= self.beta < 1:
            raise ConfigError(f"ist.beta must be in [0, 1); got {self.beta}.")
        if not 0 < self.score_lr < math.inf:
            raise ConfigError(f"ist.score_lr must be a number over 0; got {self.score_lr}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(unknown_name(f"ist.{name}", getattr(self, name), known))


def n_of(share: float, n_layers: int) -> int:
    """How many layers a share is: rounded down, at least one.

    Example:
        >>> [n_of(0.25, n) for n in (1, 3, 12, 32)]
        [1, 1, 3, 8]
    """
    return max(1, int(share * n_layers + 1e-9))


def draw(weights: Tensor, n: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw n distinct layers one after the other, each with a chance as its weight, (L,)."""
    weights = weights.clamp(min=SMALLEST_WEIGHT)
    return tuple(sorted(torch.multinomial(weights, n, generator=generator).tolist()))


def draw_different(
    weights: Tensor, n: int, count: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Draw `count` sets of n layers, no two equal; as many as there are, if those are fewer."""
    count = min(count, math.comb(len(weights), n))
    sets: list[tuple[int, ...]] = []
    while len(sets) < count:
        for attempt in range(MAX_DRAWS + 1):
            # Where weights leave one set only, others would hardly ever come up.
            alike = torch.ones_like(weights)
            one = draw(alike if attempt == MAX_DRAWS else weights, n, generator)
            if one not in sets:
                sets.append(one)
                break
    return sets


def update_scores(
    dispensability: Tensor,
    sets: Sequence[Sequence[int]],
    losses: Sequence[float],
    score_lr: float = 10.0,
    reward: str = "exp",
) -> Tensor:
    """Scores after one update: layers whose suppression hurts less than average rise.

        s_i <- s_i + mu a_k p_i (1 - p_i)   for i in S_k,   p = sigmoid(s),  a_k = r_k - mean(r)

    The derivative of p stands where that of log p would in REINFORCE, and layers outside a set are
    not changed by it; so it is in the released code. A loss that is not finite earns no reward.

    Args:
        dispensability: Scores s, (L,), float64.
        sets: Layers suppressed in each of K trials.
        losses: Loss of each trial, (K,).
        score_lr: mu.
        reward: See `IstSettings`.
    Returns:
        New scores, (L,).
    Example:
        >>> new = update_scores(torch.zeros(4), [(0, 1), (2, 3), (0, 2)], [1.0, 1.2, 0.9])
        >>> [round(v, 4) for v in new.tolist()]
        [0.1434, 0.0233, -0.0233, -0.1434]
    """
    loss = torch.tensor(losses, dtype=torch.float64)
    loss = loss.nan_to_num(nan=math.inf, posinf=math.inf)
    if not torch.isfinite(loss).any():
        return dispensability.clone()
    rewards = torch.exp(-(loss - loss.min() if reward == "relative" else loss))
    advantages = (rewards - rewards.mean()).tolist()
    p = torch.sigmoid(dispensability)
    step = torch.zeros_like(p)
    for chosen, advantage in zip(sets, advantages, strict=True):
        step[list(chosen)] += advantage
    return dispensability + score_lr * step * p * (1 - p)


class LayerSampler:
    """Scores of L layers, and the draws that come of them.

    The authors call s importance, but it grows where suppression does no harm. Here it is called
    dispensability; the importance of a layer is -s.

    Args:
        n_layers: L.
        settings: See there.
        seed: Fixes all draws.
    """

    def __init__(self, n_layers: int, settings: IstSettings, seed: int = 0) -> None:
        self.n_layers, self.settings, self.seed = n_layers, settings, seed
        self.n_trained = n_of(settings.layers, n_layers)
        self.n_suppressed = n_of(settings.suppressed, n_layers)
        self.step = 0
        self.dispensability = torch.zeros(n_layers, dtype=torch.float64)

    @property
    def is_due(self) -> bool:
        """Whether scores are updated before this step. Never if all trials would be the same."""
        different = self.n_suppressed < self.n_layers and self.settings.trials > 1
        wanted = self.settings.sampling == "importance" and different
        return wanted and self.step > 0 and self.step % self.settings.every == 0

    def trials(self) -> list[tuple[int, ...]]:
        """Sets of layers to suppress before this step: the dispensable ones more often."""
        weights = torch.sigmoid(self.dispensability)
        generator = seeded(self.seed, "ist-trials", str(self.step))
        return draw_different(weights, self.n_suppressed, self.settings.trials, generator)

    def update(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Learn from the losses of the trials."""
        mu, reward = self.settings.score_lr, self.settings.reward
        self.dispensability = update_scores(self.dispensability, sets, losses, mu, reward)

    def choose(self) -> tuple[int, ...]:
        """Layers that train in this step, ascending: important ones more often. Ends the step."""
        uniform = self.settings.sampling == "uniform"
        scores = torch.zeros_like(self.dispensability) if uniform else self.dispensability
        weights = torch.sigmoid(-scores)
        generator = seeded(self.seed, "ist-layers", str(self.step))
        self.step += 1
        return draw(weights, self.n_trained, generator)

    def probe_rows(self, n_rows: int) -> list[int]:
        """Rows of the next batch of trials: the training set shuffled, again and again."""
        size = min(self.settings.probe_rows, n_rows)
        number, place = divmod(self.step // self.settings.every - 1, n_rows // size)
        generator = seeded(self.seed, "ist-rows", str(number))
        order = torch.randperm(n_rows, generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, as plain JSON values."""
        return {"step": self.step, "dispensability": self.dispensability.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state. Raises CheckpointError if it is of another number of layers."""
        scores = torch.tensor(state["dispensability"], dtype=torch.float64)
        if scores.shape != self.dispensability.shape:
            raise CheckpointError(
                f"the saved IST state has scores of {len(scores)} layers, this model has modules "
                f"in {self.n_layers}; resume with the model and adapter it was saved with."
            )
        self.step, self.dispensability = int(state["step"]), scores
