"""KappaTune: modules on the layers whose weights are conditioned best; no data is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepeft.probes import Passes
from prunepeft.processes import whole
from prunepeft.quantized import dense_weight
from prunepeft.space import Slot
from prunepeft.strategies.allocation import Rows
from prunepeft.strategies.base import Problem
from prunepeft.strategies.module_choice import ModuleChoice

EPSILON = 1e-8


@dataclass(frozen=True)
class KappaTune(ModuleChoice):
    """Keep modules on weights of low condition number, sigma_max / sigma_min, and leave the rest.

    Such weights are expected to hold less that is specific, so that changing them forgets less.

    Attributes:
        max_factor: See `Allocator`.
        keep: Share of the modules that stay, at the rank that uses the budget up (top_p in peft).
            None: at the size of the space, the best first, until the budget is met.
    References:
        KappaTune, 2025, arXiv 2506.16289, in peft as `find_kappa_target_modules`. Differs from
        peft: layers of GPT-2 count too, layers are those of the space, none is too large, tied
        layers count by their mean, and the budget says how many stay.
    """

    name: ClassVar[str] = "kappatune"
    reads_search: ClassVar[frozenset[str]] = frozenset()

    def probe(self, problem: Problem, slots: Sequence[Slot], rank: float) -> "ConditionNumbers":
        """See `Allocator.probe`."""
        return ConditionNumbers(slots)

    def passes(self, epochs: int) -> int:
        """See `Allocator.passes`."""
        return 0

    def importance(self, slot: Slot, found: Tensor) -> float:
        """Lower condition numbers are better."""
        return 1.0 / float(found)

    def chosen(self, importance: Mapping[str, float], rows: Rows) -> list[str]:
        """See `ModuleChoice.chosen`: a share of their number."""
        order = sorted(importance, key=lambda i: -importance[i])
        return order[: max(1, int(self.keep * len(order)))]


class ConditionNumbers:
    """A `Probe`: slot id -> condition number of the frozen weight, (), mean over tied layers."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.paths = {s.id: [site.path for site in s.sites] for s in slots}
        self.config: dict[str, Any] = {"probe": "condition-numbers", "slots": self.paths}

    @torch.no_grad()
    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """See `Probe.measure`."""
        paths = dict.fromkeys(path for group in self.paths.values() for path in group)
        found = {path: self._condition(passes, path) for path in paths}
        return {
            i: torch.stack([found[path] for path in group]).mean()
            for i, group in self.paths.items()
        }

    def _condition(self, passes: Passes, path: str) -> Tensor:
        weight = whole(dense_weight(passes.model.get_submodule(path)))
        values = torch.linalg.svdvals(weight.detach().to(passes.device, torch.float32))
        number = (values[0] / (values[-1] + EPSILON)).double().cpu()
        return number if values[0] > 0 else torch.full_like(number, torch.inf)
