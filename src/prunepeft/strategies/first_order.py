"""A watcher that sums first-order scores of ranks and whole modules over a training."""

import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.errors import StateError, UnknownNameError
from prunepeft.kinds import off_neutral, seeded, slot_kind
from prunepeft.registry import unknown_name
from prunepeft.structured.importance import rank_importance
from prunepeft.supernet import placement_of, slot_layers
from prunepeft.supernet.attach import ADAPTER

AGGREGATES = ("mean", "sum", "signed")
# A parameter, the axis of the units in it (None: all of it is one), and its neutral value.
Part = tuple[nn.Parameter, int | None, Tensor | float]
_ORIGINS = "first_values"  # name on the net of the values whose contribution is subtracted


class FirstOrder:
    """A `Watcher` that scores units by what the loss would change without them.

    With the terms t_i = w_i dL/dw_i of the weights of a unit, in one optimiser step (multipliers,
    which change nothing at 1, count by w_i - 1; see `Kind.neutral`):

        mean      sum of |t_i| / number of weights
        sum       sum of |t_i|
        signed    |sum of t_i| / number of factors, the matrices at one site

    The first-order change of the loss for the whole unit is |sum of t_i|; |t_i| do not cancel. The
    terms of A and of B of a LoRA rank have one sum, which `signed` would count twice without the
    division; after it a rank compares with a bias vector. `mean` fits a budget in parameters.

    Found, on the CPU: slot id -> mean score over the steps of the last epoch, (r,), or (1,) for a
    whole module. Tied sites of a slot are one module, their ranks are summed. A tensor that belongs
    to no rank of a module that has ranks (the upper bias of an adapter) does not count.

    Args:
        aggregate: `mean`, `sum` or `signed`.
        balanced: In modules with ranks, matrices that start at zero get values from
            N(0, 1 / n), n the weights that a rank owns in it, and what all these first values
            contribute is subtracted as long as the training lasts. So the model starts as it was,
            though no factor is zero: a zero factor makes the scores of its partner vanish. With
            dropout in the modules only in expectation.
        whole: Whether every module is one unit.
        seed: Of the balanced values.
    References:
        arXiv 2305.16597, 2023 (S-MaM). There is no released code.
    """

    def __init__(
        self,
        *,
        aggregate: str = "mean",
        balanced: bool = True,
        whole: bool = False,
        seed: int = 0,
    ) -> None:
        if aggregate not in AGGREGATES:
            raise UnknownNameError(unknown_name("aggregate", aggregate, AGGREGATES))
        self.config: dict[str, Any] = {
            "watcher": "first-order",
            "aggregate": aggregate,
            "balanced": balanced,
            "whole": whole,
            "seed": seed,
        }
        self._net: PeftModel | None = None

    def attach(self, net: PeftModel) -> None:
        """See `Watcher.attach`."""
        if self._net is not None:
            raise StateError("these scores are being recorded already; stop the recording first.")
        self._net = net
        if self.config["balanced"]:
            self._balance()
        self._units = self._find_units()
        self.start(0)

    def start(self, steps: int) -> None:
        """See `Watcher.start`."""
        self.reset()

    def mark(self) -> None:
        """See `Watcher.mark`; scores are those of the last epoch."""
        self.reset()

    def reset(self) -> None:
        """See `Watcher.reset`."""
        self._steps = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """See `Watcher.step`."""
        how = "sum" if self.config["aggregate"] == "signed" else "abs"
        for slot_id, parts in self._units.items():
            given = [
                (_rows(off_neutral(w, neutral), axis), _rows(_gradient(w), axis), 0)
                for w, axis, neutral in parts
            ]
            score = rank_importance(given, how)
            held = self._sums.get(slot_id)
            self._sums[slot_id] = score if held is None else held + score
        self._steps += 1

    def stop(self) -> dict[str, Tensor]:
        """See `Watcher.stop`."""
        if not self._steps:
            self.abandon()
            raise StateError("no optimiser step was seen, so there is no score; train longer.")
        scores = {
            i: total.cpu() / (self._steps * self._divisor(i)) for i, total in self._sums.items()
        }
        self.abandon()
        return scores

    def abandon(self) -> None:
        """See `Watcher.abandon`."""
        if self._net is None:
            return
        for layers in slot_layers(self._net).values():
            for layer, kind in layers:
                layer.branches[ADAPTER][kind].origin = None
        if hasattr(self._net, _ORIGINS):
            delattr(self._net, _ORIGINS)
        self._net = None
        self._units = {}

    def _divisor(self, slot_id: str) -> int:
        parts = self._units[slot_id]
        if self.config["aggregate"] == "sum":
            return 1
        if self.config["aggregate"] == "signed":
            layers = slot_layers(self._net)[slot_id]
            if any("attention" in la.branches[ADAPTER][k].stages for la, k in layers):
                return 1  # keys and values are not factors of one product
            return max(1, sum(w.ndim > 1 for w, *_ in parts) // len(layers))
        return sum(_rows(w, axis).shape[1] for w, axis, _ in parts)

    def _find_units(self) -> dict[str, list[Part]]:
        kinds = {slot.id: slot_kind(slot) for slot in placement_of(self._net)}
        units: dict[str, list[Part]] = {}
        for slot_id, layers in slot_layers(self._net).items():
            kind = kinds[slot_id]
            named = [
                (name, p, kind.neutral(name, layer))
                for layer, k in layers
                for name, p in layer.params(ADAPTER, k).items()
            ]
            ranked = [(p, axis, v) for name, p, v in named for axis in kind.rank_axes(name, p)]
            whole = self.config["whole"] or not ranked
            units[slot_id] = [(p, None, v) for _, p, v in named] if whole else ranked
        return units

    @torch.no_grad()
    def _balance(self) -> None:
        """Fill zero factors with noise, and let the branches subtract these first values."""
        origins = nn.ModuleList()
        for slot_id, layers in slot_layers(self._net).items():
            for layer, kind in layers:
                branch = layer.branches[ADAPTER][kind]
                params = layer.params(ADAPTER, kind)
                zero = [n for n, p in params.items() if _is_zero_factor(branch.kind, n, p)]
                draw = seeded(self.config["seed"], slot_id, branch.site.path)
                for name in zero:
                    p = params[name]
                    (axis, *_) = branch.kind.rank_axes(name, p)
                    noise = torch.randn(p.shape, generator=draw)
                    p.copy_(noise * math.sqrt(p.shape[axis] / p.numel()))
                if zero:
                    held = {n: nn.Parameter(p.clone(), False) for n, p in params.items()}
                    branch.origin = held
                    origins.append(nn.ParameterList(held.values()))
        self._net.add_module(_ORIGINS, origins)


def _is_zero_factor(kind: Any, name: str, p: Tensor) -> bool:
    return p.ndim > 1 and bool(kind.rank_axes(name, p)) and not p.any()


def _gradient(w: Tensor) -> Tensor:
    return torch.zeros_like(w) if w.grad is None else w.grad


def _rows(w: Tensor, axis: int | None) -> Tensor:
    """One row per unit, (units, weights of one)."""
    return w.reshape(1, -1) if axis is None else w.movedim(axis, 0).reshape(w.shape[axis], -1)
