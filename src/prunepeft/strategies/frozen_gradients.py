"""Scores of frozen weights by their gradients, which are folded away as soon as they are there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.probes import Passes
from prunepeft.space import Slot

MEASURES = ("weight_times_mean", "mean_square")


class FrozenGradients:
    """A `Probe` that scores slots by the gradients of the weights that they sit on.

    With G_s the gradient of the mean loss of step s, over all entries of the weights of a slot:

        weight_times_mean    mean |W * mean_s G_s|
        mean_square          mean over steps of mean G_s^2

    Found: slot id -> score, (), float64. For the first, sums of G are kept in float32 on the CPU,
    as large as the weights themselves; the second keeps one number a weight. A gradient leaves the
    device as soon as backward is through with its layer, unless a step comes in several pieces or
    on several processes, where gradients of one step are held.

    Args:
        slots: Where modules may go.
        measure: One of the two.
        warm_head: Whether the task head is trained alone before.
    """

    def __init__(self, slots: Sequence[Slot], *, measure: str, warm_head: bool) -> None:
        self.paths = {s.id: [site.path for site in s.sites] for s in slots}
        self.config: dict[str, Any] = {
            "probe": "frozen-gradients",
            "measure": measure,
            "slots": self.paths,
            "warm_head": warm_head,
        }

    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """See `Probe.measure`."""
        if self.config["warm_head"]:
            passes.learn_head()
        paths = dict.fromkeys(path for group in self.paths.values() for path in group)
        weights = {path: passes.model.get_submodule(path).weight for path in paths}
        kind = _Sums if self.config["measure"] == "weight_times_mean" else _Squares
        recorder = kind(weights, lambda: passes.whole)
        try:
            passes.gradients(list(weights.values()), recorder)
        finally:
            recorder.stop()
        totals = recorder.read()
        sizes = {path: weights[path].numel() for path in paths}
        return {
            i: torch.tensor(
                sum(totals[path] for path in group) / sum(sizes[path] for path in group),
                dtype=torch.float64,
            )
            for i, group in self.paths.items()
        }


class _Folded:
    """A `Recorder` that folds each gradient away, at once where that is allowed, else per step."""

    def __init__(self, weights: Mapping[str, nn.Parameter], whole: Callable[[], bool]) -> None:
        self.weights, self.whole = dict(weights), whole
        self._hooks: list[Any] = []
        self.reset()

    def mark(self) -> None:
        # Not before: weights that are frozen take no hooks.
        self._hooks = self._hooks or [
            w.register_post_accumulate_grad_hook(lambda w, path=path: self._at_once(path, w))
            for path, w in self.weights.items()
        ]
        self.reset()

    def reset(self) -> None:
        self.steps = 0

    def step(self) -> None:
        for path, weight in self.weights.items():
            if weight.grad is not None:
                self._fold(path, weight)
        self.steps += 1

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _at_once(self, path: str, weight: nn.Parameter) -> None:
        if self.whole():
            self._fold(path, weight)

    @torch.no_grad()
    def _fold(self, path: str, weight: nn.Parameter) -> None:
        self.add(path, weight.grad)
        weight.grad = None

    def add(self, path: str, grad: Tensor) -> None:
        raise NotImplementedError


class _Sums(_Folded):
    """Sum of the gradients over the steps, on the CPU."""

    def reset(self) -> None:
        super().reset()
        self.sums: dict[str, Tensor] = {}

    def add(self, path: str, grad: Tensor) -> None:
        grad = grad.to("cpu", torch.float32, copy=True)
        self.sums[path] = grad if path not in self.sums else self.sums[path].add_(grad)

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Sum of |W * mean G| of each weight."""
        found = dict.fromkeys(self.weights, 0.0)
        for path, total in self.sums.items():
            product = self.weights[path].detach().to("cpu", torch.float32) * total
            found[path] = float(product.abs().sum(dtype=torch.float64)) / max(1, self.steps)
        return found


class _Squares(_Folded):
    """Sum of the squared entries over the steps, one number a weight, on its device."""

    def reset(self) -> None:
        super().reset()
        self.sums: dict[str, Tensor] = {}

    def add(self, path: str, grad: Tensor) -> None:
        square = grad.float().square().sum(dtype=torch.float64)
        self.sums[path] = self.sums.get(path, 0) + square

    def read(self) -> dict[str, float]:
        """Mean over the steps of the sum of squares of each weight."""
        return dict.fromkeys(self.weights, 0.0) | {
            path: float(total) / max(1, self.steps) for path, total in self.sums.items()
        }
