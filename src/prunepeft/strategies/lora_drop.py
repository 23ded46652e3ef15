"""LoRA-drop: after a short training, keep the modules whose output is largest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepeft.batches import derive_seed
from prunepeft.probes import Passes
from prunepeft.space import Placement, Slot
from prunepeft.strategies.allocation import Rows, reaching
from prunepeft.strategies.base import Problem
from prunepeft.strategies.explained_variance import counted, token_mask
from prunepeft.strategies.module_choice import ModuleChoice
from prunepeft.supernet import attach, detach, slot_layers


@dataclass(frozen=True)
class LoraDrop(ModuleChoice):
    """Train every LoRA for a short while and keep those with the largest mean |s B A x|^2.

    The length of the training is `Fidelity`; then the same rows are read once more, without
    dropout, with the weights at the end.

    Attributes:
        max_factor: See `Allocator`.
        keep: The smallest set of modules that holds this share of all importance stays (0.9 in
            the paper), at the rank that uses the budget up. None: at the size of the space, best
            first, until the budget is met.
    References:
        LoRA-drop, COLING 2025, arXiv 2402.07721. The one LoRA that all dropped layers share there
        is left out.
    """

    name: ClassVar[str] = "lora_drop"

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> "OutputNorms":
        """See `Allocator.probe`."""
        placement = Placement({s: s.sizes[-1] for s in slots})
        return OutputNorms(placement, derive_seed(problem.seed, "init", 1))

    def passes(self, epochs: int) -> int:
        """See `Allocator.passes`."""
        return epochs + 1

    def chosen(self, importance: Mapping[str, float], rows: Rows) -> list[str]:
        """See `ModuleChoice.chosen`: a share of their importance."""
        return reaching(importance, self.keep)


class OutputNorms:
    """A `Probe`: slot id -> mean over tokens of the squared norm of what the module adds, ().

    Tied layers are one module, whose norms add up. Padding does not count.

    Args:
        placement: What is trained.
        init_seed: First values of the modules.
    """

    def __init__(self, placement: Placement, init_seed: int) -> None:
        self.placement, self.init_seed = placement, init_seed
        self.config: dict[str, Any] = {
            "probe": "output-norms",
            "placement": placement.digest,
            "init_seed": init_seed,
        }

    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """See `Probe.measure`."""
        net = attach(
            passes.model,
            self.placement,
            seed=self.init_seed,
            modules_to_save=list(passes.head) or None,
            task_type=passes.task_type,
        )
        try:
            passes.learn(net)
            return self._norms(net, passes)
        finally:
            detach(net)

    def _norms(self, net: Any, passes: Passes) -> dict[str, Tensor]:
        sums: dict[tuple[str, str], Tensor] = {}
        counts: dict[tuple[str, str], int] = {}
        mask: Tensor | None = None

        def begin(batch: Mapping[str, Tensor]) -> bool:
            nonlocal mask
            mask = token_mask(batch)
            return True

        def observe(branch: Any, delta: Tensor, base: Tensor) -> None:
            rows = counted(delta, mask)
            at = branch.slot_id, branch.site.path
            square = rows.float().square().sum(dtype=torch.float64)
            sums[at] = sums.get(at, 0) + square
            counts[at] = counts.get(at, 0) + len(rows)

        layers = slot_layers(net)
        hosts = {id(layer): layer for pairs in layers.values() for layer, _ in pairs}.values()
        for layer in hosts:
            layer.observer = observe
        try:
            passes.look(net, begin)
        finally:
            for layer in hosts:
                layer.observer = None
        found = {i: torch.zeros((), dtype=torch.float64) for i in layers}
        for (slot_id, path), total in sums.items():
            found[slot_id] += total.cpu() / max(1, counts[slot_id, path])
        return found
