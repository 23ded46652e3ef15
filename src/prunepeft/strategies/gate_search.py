"""A watcher that puts a gate on every module and learns the gates while the modules train."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.errors import StateError
from prunepeft.kinds import seeded
from prunepeft.strategies.shifted_sigmoid import concrete, gate_probabilities
from prunepeft.supernet import gate_slots, slot_layers
from prunepeft.supernet.attach import ADAPTER

_GATES = "search_gates"  # name of the gates on the net
_DECAYS, _EPS = (0.9, 0.999), 1e-8
UPDATES = ("alternate", "joint")


@dataclass(frozen=True)
class _State:
    """Logits (N,) with Adam's moments, after so many optimiser steps and updates of the logits."""

    logits: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0
    updates: int = 0


class GateSearch:
    """A `Watcher` that learns one logit per slot, under a budget shared by all.

    Found, on the CPU, in the order of `costs`: `logit` and `probability`, (N,) float64.

    In every optimiser step the gates z are numbers: `concrete` of the probabilities and of noise
    that depends on the seed and the number of the step alone. Their gradients gather over
    micro-batches and processes like those of the modules. `step` sends them on to the logits.

    Args:
        costs: Slot id -> cost, for all slots of the placement.
        budget: What they may cost in expectation; above 0 and below the sum of the costs.
        seed: Of the noise.
        lr: Learning rate of the logits; falls to zero along a line.
        beta: Temperature of the sigmoid.
        gradient: See `gate_probabilities`.
        update: `alternate`: steps 1, 3, ... train the modules, steps 2, 4, ... the logits on other
            rows; `joint`: every step trains both on the same rows. One step alone is joint.
        max_grad_norm: Gradients of the logits are scaled down to this norm.
    References:
        S3Delta, 2022, arXiv 2206.07382, which takes the rows from DARTS, 2019, arXiv 1806.09055.
        See `S3Delta` for what differs from the released code.
    """

    def __init__(
        self,
        costs: Mapping[str, int],
        budget: float,
        *,
        seed: int,
        lr: float = 0.1,
        beta: float = 1.0,
        gradient: str = "implicit",
        update: str = "alternate",
        max_grad_norm: float = 2.0,
    ) -> None:
        self.ids = list(costs)
        self.costs = torch.tensor([float(n) for n in costs.values()], dtype=torch.float64)
        self.config: dict[str, Any] = {
            "watcher": "s3delta",
            "costs": dict(costs),
            "budget": budget,
            "seed": seed,
            "lr": lr,
            "beta": beta,
            "gradient": gradient,
            "update": update,
            "max_grad_norm": max_grad_norm,
        }
        self._net: PeftModel | None = None

    def attach(self, net: PeftModel) -> None:
        """See `Watcher.attach`."""
        if self._net is not None:
            raise StateError("these gates are on a model already; stop that training first.")
        layers = slot_layers(net)
        if set(layers) != set(self.ids):
            raise StateError(
                f"{len(self.ids)} costs do not fit the {len(layers)} modules of this model; give "
                "one for each."
            )
        device = next(net.parameters()).device
        gates = nn.ParameterList(nn.Parameter(torch.ones((), device=device)) for _ in self.ids)
        net.add_module(_GATES, gates)
        for slot_id, gate in zip(self.ids, gates, strict=True):
            for layer, kind in layers[slot_id]:
                layer.branches[ADAPTER][kind].gate = gate
        self._net = net
        self.start(0)

    def start(self, steps: int) -> None:
        """See `Watcher.start`."""
        self._alternates = self.config["update"] == "alternate" and steps > 1
        self._n_updates = steps // 2 if self._alternates else steps
        zeros = torch.zeros_like(self.costs)
        self._state = _State(zeros, zeros, zeros)
        self.mark()
        self._draw()

    def mark(self) -> None:
        """See `Watcher.mark`."""
        self._marked = self._state

    def reset(self) -> None:
        """See `Watcher.reset`."""
        self._state = self._marked
        self._draw()

    def step(self) -> None:
        """See `Watcher.step`. Parameters that this step does not train lose their gradient."""
        slope = self._slope()
        step = self._state.step
        if not self._alternates:
            self._state = self._updated(slope)
        elif step % 2:
            self._state = self._updated(slope)
            for parameter in self._net.parameters():
                parameter.grad = None
        self._state = replace(self._state, step=step + 1)
        self._draw()

    def stop(self) -> dict[str, Tensor]:
        """See `Watcher.stop`."""
        logits = self._state.logits
        self.abandon()
        return {"logit": logits.clone(), "probability": self._probabilities(logits)}

    def abandon(self) -> None:
        """See `Watcher.abandon`."""
        if self._net is not None:
            gate_slots(self._net, dict.fromkeys(self.ids, 1.0))
            delattr(self._net, _GATES)
            self._net = None

    def _gates(self) -> nn.ParameterList:
        return getattr(self._net, _GATES)

    def _probabilities(self, logits: Tensor) -> Tensor:
        c = self.config
        return gate_probabilities(logits, self.costs, c["budget"], c["beta"], c["gradient"])

    def _noise(self) -> Tensor:
        draw = seeded(self.config["seed"], "gates", str(self._state.step))
        return torch.rand(len(self.ids), generator=draw, dtype=torch.float64)

    @torch.no_grad()
    def _draw(self) -> None:
        """Fresh gates for the next step."""
        drawn = concrete(self._probabilities(self._state.logits), self._noise())
        gates = self._gates()
        for gate, value in zip(gates, drawn.float().to(gates[0].device), strict=True):
            gate.copy_(value)

    def _slope(self) -> Tensor:
        """Gradient of the loss by the gates, (N,), taken off them so that only the logits learn.

        What is not finite tells nothing and counts as 0.
        """
        gates = list(self._gates())
        found = [torch.zeros_like(g) if g.grad is None else g.grad for g in gates]
        for gate in gates:
            gate.grad = None
        return torch.stack(found).cpu().double().nan_to_num(0.0, 0.0, 0.0)

    def _updated(self, slope: Tensor) -> _State:
        """One step of Adam on the logits, from the gradient of the gates of this step."""
        state, config = self._state, self.config
        logits = state.logits.clone().requires_grad_(True)
        drawn = concrete(self._probabilities(logits), self._noise())
        (grad,) = torch.autograd.grad(drawn, logits, slope)
        grad = grad * min(1.0, config["max_grad_norm"] / (float(grad.norm()) + 1e-6))
        n = state.updates + 1
        first, second = _DECAYS
        mean = first * state.mean + (1 - first) * grad
        square = second * state.square + (1 - second) * grad**2
        rate = config["lr"] * (1 - state.updates / max(n, self._n_updates))
        size = rate / (1 - first**n)
        change = mean / ((square / (1 - second**n)).sqrt() + _EPS)
        return _State(state.logits - size * change, mean, square, state.step, n)
