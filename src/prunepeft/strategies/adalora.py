"""AdaLoRA: train more ranks than the budget allows, and mask the least important as it goes."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from prunepeft.errors import ConfigError
from prunepeft.probes import Passes
from prunepeft.space import Slot
from prunepeft.strategies.allocator import Allocator
from prunepeft.strategies.base import Problem
from prunepeft.supernet import detach

MIN_STEPS = 10
ADAPTER = "default"


@dataclass(frozen=True)
class AdaLora(Allocator):
    """Adaptive budget allocation by peft's AdaLoRA; its last ranks, scaled to the budget.

    Every layer starts with `max_factor` times the rank that all could have alike. The budget falls
    to that rank along a cubic schedule, from a tenth of the steps to the last one; then ranks are
    handed over and the modules are trained from fresh values as plain LoRA.

    Attributes:
        max_factor: See `Allocator`; 1.5 if not given, and at least one rank more than in the end.
    References:
        AdaLoRA, ICLR 2023, arXiv 2303.10512. Importance, masks and orthogonality are peft's.
        Differs from usual settings there: alpha is twice the first rank, as for our LoRA; there
        is no final phase, since the modules are trained anew.
    """

    name: ClassVar[str] = "adalora"
    default_max: ClassVar[float] = 1.5
    needs_whole_base: ClassVar[bool] = (
        True  # peft's tuner runs the model's forward without its hooks
    )

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: also enough steps to tell ranks apart."""
        super().check(problem)
        if (steps := problem.n_steps(problem.fidelity)) < MIN_STEPS:
            raise ConfigError(
                f"method adalora needs {MIN_STEPS} optimiser steps and gets {steps}; raise "
                "search.epochs or search.fidelity, or lower train.batch_size."
            )

    def largest(self, rank: float) -> int:
        """See `Allocator.largest`; more than the rank that all could have."""
        return max(super().largest(rank), _target(rank) + 1)

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> "MaskedRanks":
        """See `Allocator.probe`."""
        target = _target(rank)
        return MaskedRanks(slots, first=max(self.largest(rank), target + 1), target=target)


class MaskedRanks:
    """A `Probe`: slot id -> rank that AdaLoRA leaves its layers, (), mean over tied ones.

    Args:
        slots: Where modules may go.
        first: Rank at the start.
        target: Mean rank at the end.
    """

    def __init__(self, slots: Sequence[Slot], *, first: int, target: int) -> None:
        self.paths = {s.id: [site.path for site in s.sites] for s in slots}
        self.config: dict[str, Any] = {
            "probe": "adalora",
            "slots": self.paths,
            "first": first,
            "target": target,
        }

    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """See `Probe.measure`."""
        if getattr(passes.model, "is_quantized", False) and not passes.task_type:
            raise ConfigError(
                "method adalora cannot train on this quantised model, for whose task peft has no "
                "type; use another method, for example eva, or leave quantize out."
            )
        with torch.random.fork_rng():
            torch.manual_seed(passes.seed)
            net = get_peft_model(passes.model, self._peft_config(passes), adapter_name=ADAPTER)
        try:
            allocation = _Allocation(net.base_model)
            # The tuner adds its penalty to the loss; without a task type peft's model passes it by.
            called = net if passes.task_type else net.base_model
            passes.learn(called, recorder=allocation, after_step=allocation.after_step)
            ranks = allocation.ranks()
        finally:
            detach(net)
        return {
            i: torch.tensor(sum(ranks[path] for path in group) / len(group), dtype=torch.float64)
            for i, group in self.paths.items()
        }

    def _peft_config(self, passes: Passes) -> AdaLoraConfig:
        paths = dict.fromkeys(path for group in self.paths.values() for path in group)
        first, target = self.config["first"], self.config["target"]
        return AdaLoraConfig(
            target_modules="|".join(re.escape(path) for path in paths),
            modules_to_save=list(passes.head) or None,
            task_type=passes.task_type,
            init_r=first,
            target_r=target,
            lora_alpha=2 * first,
            tinit=passes.n_steps // 10,
            tfinal=0,
            deltaT=1,
            total_step=passes.n_steps,
        )


class _Allocation:
    """Counts the steps for peft's allocator; an epoch that is run again counts once."""

    def __init__(self, tuner: nn.Module) -> None:
        self.tuner = tuner
        self._step = 0
        self._marked: tuple[int, Any] | None = None

    def mark(self) -> None:
        """An epoch begins."""
        self._marked = self._step, copy.deepcopy(self._state())

    def reset(self) -> None:
        """See `Recorder.reset`."""
        self._step, state = self._marked
        for name, value in copy.deepcopy(state).items():
            setattr(self.tuner.rankallocator, name, value)

    def step(self) -> None:
        """See `Recorder.step`."""

    def after_step(self) -> None:
        """The optimizer made a step. peft takes for granted that all ranks have gradients."""
        for parameter in self.tuner.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._step += 1
        self.tuner.update_and_allocate(self._step)

    def ranks(self) -> dict[str, int]:
        """Path of a layer -> ranks that are left."""
        pattern = self.tuner.peft_config[ADAPTER].rank_pattern
        ending = f".lora_E.{ADAPTER}"
        return {name.removesuffix(ending): sum(kept) for name, kept in pattern.items()}

    def _state(self) -> dict[str, Any]:
        names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return {name: getattr(self.tuner.rankallocator, name) for name in names}


def _target(rank: float) -> int:
    return max(1, math.floor(rank + 0.5))
