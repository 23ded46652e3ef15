"""How important modules and their ranks are, in one step and over many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prunepeft.errors import StateError, UnknownNameError
from prunepeft.registry import unknown_name

RANK_IMPORTANCE = ("mean", "sum", "abs")

Sides = Sequence[tuple[Tensor, Tensor, int]]  # weight, its gradient, the axis of its ranks


def relative_change(delta: Tensor, base: Tensor, valid: Tensor | None = None) -> Tensor:
    """How much a module changes what it is added to: |a| / |z| summed over tokens, and how many.

    Tokens with z = 0 are left out: there the ratio has no meaning.

    Args:
        delta: What the module adds, a, (..., d).
        base: What it is added to, z, (..., d): at LoRA the frozen output, at a serial adapter the
            output before it, at stage "input" the layer's input, at a prefix the attention's output
            without it.
        valid: True for real tokens, in the order of the leading axes; None: all are.
    Returns:
        Sum and number, (2,), float32, on the device of `delta`.
    References:
        Light-PEFT, 2024, arXiv 2406.03792 ("p2" in its code). Differs from released code: it takes
        no heed of z = 0, which makes a whole step infinite.
    """
    lengths = [
        torch.linalg.vector_norm(
            t.detach(), dim=-1, dtype=torch.promote_types(t.dtype, torch.float32)
        )
        for t in (delta, base)
    ]
    lengths = [length.float().flatten() for length in lengths]
    counted = lengths[1] != 0
    if valid is not None:
        counted = counted & valid.flatten()
    ratio = torch.where(counted, lengths[0] / lengths[1], 0.0)
    return torch.stack([ratio.sum(), counted.sum().float()])


def rank_importance(sides: Sides, how: str = "mean") -> Tensor:
    """First-order importance of each rank of a module.

    With the terms w * dL/dw of the weights that a rank owns in each tensor (at LoRA a row of A and
    a column of B), both taken together:

        mean    |mean of the terms|, summed over tensors (as released)
        sum     |sum of all terms|: does not favour narrow layers
        abs     sum of |term|: terms of unlike sign do not cancel

    At LoRA the terms of A and of B have one sum, so `mean` is that sum times (1/d_in + 1/d_out).

    Args:
        sides: Weight, gradient (same shape) and axis of the ranks, for each tensor.
        how: One of `RANK_IMPORTANCE`.
    Returns:
        (r,), float32.
    References:
        Light-PEFT, 2024, arXiv 2406.03792 ("first_order" in its code).
    Example:
        >>> a, b = torch.eye(2), torch.diag(torch.tensor([1.0, 2.0]))
        >>> grads = torch.tensor([[1.0, 2.0], [-2.0, -4.0]]), torch.tensor([[1.0, 2.0], [-1, -2.0]])
        >>> rank_importance([(a, grads[0], 0), (b, grads[1], 1)]).tolist()
        [1.0, 4.0]
    """
    if how not in RANK_IMPORTANCE:
        raise UnknownNameError(unknown_name("rank importance", how, RANK_IMPORTANCE))
    terms = [(w.float() * g.float()).movedim(axis, 0).flatten(1) for w, g, axis in sides]
    if how == "mean":
        return torch.stack([t.mean(1).abs() for t in terms]).sum(0)
    if how == "sum":
        return torch.stack([t.sum(1) for t in terms]).sum(0).abs()
    return torch.stack([t.abs().sum(1) for t in terms]).sum(0)


class LateMean:
    """Mean over the second half of N steps, from step floor(N/2) on; no step is kept.

    What is not finite is left out of sum and count. Differs from released code, which counts it as
    zero.

    Example:
        >>> late = LateMean(4)
        >>> for score in (10.0, 10.0, 2.0, 4.0):
        ...     late.add(torch.tensor(score))
        >>> late.mean().item()
        3.0
    """

    def __init__(self, steps: int) -> None:
        self.first = steps // 2
        self.seen = 0
        self._sums: Tensor | None = None  # (2, ...): sum, and number of finite values

    @property
    def is_due(self) -> bool:
        """Whether the next step counts."""
        return self.seen >= self.first

    def add(self, values: Tensor) -> None:
        """Take in the scores of one step; those of a step before the middle may be anything."""
        if self.is_due:
            fine = values.isfinite()
            step = torch.stack([torch.where(fine, values, 0.0), fine.to(values.dtype)])
            self._sums = step if self._sums is None else self._sums + step
        self.seen += 1

    def mean(self) -> Tensor:
        """The mean so far, on the CPU; zero where no value was finite.

        Raises:
            StateError: if no step of the second half was seen.
        """
        if self._sums is None:
            raise StateError(
                f"{self.seen} optimiser steps were seen, the scores are those from step "
                f"{self.first + 1} on. Announce the number of steps that are trained."
            )
        total, count = self._sums.cpu()
        return total / count.clamp(min=1)
