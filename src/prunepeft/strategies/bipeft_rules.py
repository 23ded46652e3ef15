"""The rules of BIPEFT as pure functions of tensors: sampling, sensitivity, what goes and when.

N modules; a module has up to C candidate dimensions. Everything is float64 on the CPU, but the
products of weights and gradients, which stay where the weights are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CRITERIA = ("mixed", "weights", "structure", "sum", "agreed")


def temperature(done: int, total: int, first: float = 5.0, last: float = 1.0) -> float:
    """Temperature of the samples after `done` of `total` steps: falls along a line.

    Example:
        >>> [round(temperature(epoch, 15), 3) for epoch in (0, 5, 14)]
        [5.0, 3.667, 1.267]
    """
    return first + (last - first) * done / max(1, total)


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, in float64."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))


def one_hot_sample(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """Straight-through Gumbel-softmax over the last axis: one-hot values, gradient of the softmax.

    Args:
        logits: (..., C); minus infinity is never drawn.
        noise: Standard Gumbel noise, (..., C).
        tau: Temperature.
    References:
        Gumbel-softmax, 2017, arXiv 1611.01144, section 2.2.
    """
    soft = torch.softmax((logits + noise) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return hard + soft - soft.detach()


def adam(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor, int], lr: float
) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
    """One step of Adam, decays 0.5 and 0.999; the new value, and the moments with their count."""
    mean, square, n = moments[0], moments[1], moments[2] + 1
    mean = 0.5 * mean + 0.5 * gradient
    square = 0.999 * square + 0.001 * gradient**2
    scale = (square / (1 - 0.999**n)).sqrt() + 1e-8
    return value - lr * mean / (1 - 0.5**n) / scale, (mean, square, n)


def importance(
    weights: Sequence[Tensor], structure: Sequence[Tensor], n: int, criterion: str = "mixed"
) -> Tensor:
    """First-order importance of one module, from the rows of both halves.

    With S = sum |w dL/dw| / n for either half, and c the mean over the module's tensors of the
    cosine between the two products:

        mixed    S_w + c S_a      weights  S_w      structure  S_a
        sum      S_w + S_a        agreed   c (S_w + S_a)

    Args:
        weights: w dL/dw of every tensor on rows that train the weights.
        structure: The same on rows that train the structure.
        n: Weights of the module that act.
        criterion: Which of the above.
    Returns:
        (), float64.
    References:
        BIPEFT, 2024, arXiv 2410.09079. A product that is all zero has cosine 0.
    """
    s_w, s_a = (sum(p.abs().sum().double() for p in side) / n for side in (weights, structure))
    if criterion in ("weights", "structure", "sum"):
        return {"weights": s_w, "structure": s_a, "sum": s_w + s_a}[criterion]
    c = sum(_cosine(a, b) for a, b in zip(weights, structure, strict=True)) / len(weights)
    return c * (s_w + s_a) if criterion == "agreed" else s_w + c * s_a


def select(sensitivity: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Modules by falling sensitivity, each that still fits, as zeros and ones (N,); ties in order.

    Example:
        >>> select(torch.tensor([0.5, 0.1, 0.3, 0.2]), torch.tensor([4, 1, 3, 2]), 6).tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    chosen = torch.zeros(len(costs), dtype=torch.float64)
    left = budget
    for i in sensitivity.sort(descending=True, stable=True).indices.tolist():
        if float(costs[i]) <= left:
            chosen[i] = 1.0
            left -= float(costs[i])
    return chosen


def is_settled(earlier: Sequence[Tensor], now: Tensor, threshold: float, window: int) -> bool:
    """Whether the mean cosine between a selection and the `window` before it is high enough."""
    if len(earlier) < window:
        return False
    return float(sum(_cosine(past, now) for past in earlier[-window:])) / window >= threshold


def expected_costs(
    logits: Tensor, costs: Tensor, frozen: Tensor, presence: Tensor | None = None
) -> Tensor:
    """Cost of every module in expectation over its dimension, and over presence if it is given.

    Args:
        logits: Of the dimensions, (N, C); minus infinity where a module has fewer.
        costs: Of every candidate, (N, C).
        frozen: Index of the dimension a module is held at, (N,); -1: not held.
        presence: Probability that a module is there, (N,).
    Returns:
        (N,).
    References:
        BIPEFT, 2024, arXiv 2410.09079. Differs from released code: costs of the candidates
        themselves, not a share of the largest, which would cut biases too.
    """
    share = torch.softmax(logits, -1)
    held = F.one_hot(frozen.clamp(min=0), logits.shape[-1]).to(share)
    share = torch.where(frozen[:, None] >= 0, held, share)
    cost = (share * costs).sum(-1)
    return cost if presence is None else cost * presence


def removals(sensitivity: Tensor, expected: Tensor, kept: Tensor, target: float) -> list[int]:
    """Kept modules to remove: the least sensitive, as long as they cost at most `target`.

    The first goes even if it costs more; the last module of all stays.

    Args:
        sensitivity: (N,).
        expected: What each costs, (N,).
        kept: Whether a module is still there, (N,).
        target: What all that go may cost; nothing goes if it is 0 or less.
    References:
        BIPEFT, 2024, arXiv 2410.09079. Differs from released code: that skips a module that costs
        too much, so that large ones stay while smaller, more sensitive ones go.
    """
    order = [i for i in sensitivity.sort(stable=True).indices.tolist() if kept[i]]
    if target <= 0 or len(order) < 2:
        return []
    spent = expected[order[:-1]].cumsum(0)
    return order[: max(1, int((spent <= target).sum()))]


def instability(history: Tensor) -> Tensor:
    """How much the dimension of every module still moves; 0 if its logits stood still.

    mean_k std_t(h[t, k]) * KL(softmax(h[T]) || softmax(h[1])), over the candidates it has.

    Args:
        history: Logits of the dimensions, (T, N, C); minus infinity where there is no candidate.
    Returns:
        (N,).
    References:
        BIPEFT, 2024, arXiv 2410.09079.
    Example:
        >>> h = torch.tensor([[[0.1, 0.0, 0.2]], [[0.1, 0.0, 0.4]], [[0.1, 0.0, 0.6]]])
        >>> round(instability(h).item(), 6)
        0.001305
    """
    exists = history[0].isfinite()
    if len(history) < 2:
        return torch.zeros(len(exists), dtype=history.dtype)
    values = history.where(exists, 0.0)
    spread = (values.std(0) * exists).sum(-1) / exists.sum(-1)
    first, last = torch.log_softmax(history[0], -1), torch.log_softmax(history[-1], -1)
    gap = torch.where(exists, last - first, 0.0)
    return spread * (last.exp() * gap).sum(-1).clamp(min=0)


def newly_frozen(history: Tensor, frozen: Tensor, kept: Tensor, left: int) -> Tensor:
    """The dimensions after a fire: those that move least are held where they are.

    Of the modules not held yet, the share whose best dimension is as at the start of the history,
    divided by the fires left, is held; all of them once no more than one fire is left.

    Args:
        history: See `instability`.
        frozen: See `expected_costs`.
        kept: Whether a module is still there, (N,).
        left: Fires left after this one.
    Returns:
        The new `frozen`.
    References:
        BIPEFT, 2024, arXiv 2410.09079. Differs from released code: the share of dimensions that
        did not change, where that takes the cosine of their indices.
    """
    free = ((frozen < 0) & kept).nonzero()[:, 0]
    if not len(free):
        return frozen
    now = history[-1].argmax(-1)
    same = (history[0].argmax(-1) == now)[free].double().mean().item()
    count = len(free) if left <= 1 else int(same * len(free) / left)
    calmest = free[instability(history)[free].sort(stable=True).indices[:count]]
    return frozen.index_copy(0, calmest, now[calmest])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).nan_to_num(0.0, 0.0, 0.0)
