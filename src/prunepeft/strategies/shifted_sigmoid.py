"""Gates that share a budget: pure functions of tensors, in float64 for exact sums.

    p_i = sigmoid((a_i - zeta) / beta)      zeta such that  sum_i n_i p_i = B

One shift for all positions: a position gains only what others lose.
"""

import torch
from torch import Tensor

from prunepeft.errors import BudgetError, UnknownNameError
from prunepeft.registry import unknown_name

GRADIENTS = ("implicit", "detach")
_WIDE = 50.0  # sigmoid(-50) is 2e-22
_HALVINGS = 80
_EDGE = 1e-9


def shift(logits: Tensor, costs: Tensor, budget: float, beta: float = 1.0) -> Tensor:
    """The shift zeta at which the expected cost is the budget, by bisection.

    Args:
        logits: a, (N,).
        costs: n, (N,), above 0.
        budget: B, above 0 and below the sum of all costs.
        beta: Temperature of the sigmoid.
    Returns:
        zeta, (), without gradient.
    Raises:
        BudgetError: if no shift can meet the budget.
    References:
        S3Delta, 2022, arXiv 2206.07382. Differs from released code: that runs a general root
        finder from the last value and does not check that it arrived.
    Example:
        >>> costs = torch.tensor([10.0, 10.0, 20.0, 40.0], dtype=torch.float64)
        >>> round(shift(torch.zeros(4, dtype=torch.float64), costs, 20).item(), 4)
        1.0986
    """
    total = float(costs.sum())
    if not 0 < budget < total:
        raise BudgetError(
            f"gates can share a budget above 0 and below the cost of all modules, {total:,.0f}; "
            f"got {budget:,.0f}. With a larger budget keep all modules."
        )
    a = logits.detach()
    low, high = a.min() - _WIDE * beta, a.max() + _WIDE * beta
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_much = (costs * torch.sigmoid((a - middle) / beta)).sum() > budget
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (low + high) / 2


def gate_probabilities(
    logits: Tensor, costs: Tensor, budget: float, beta: float = 1.0, gradient: str = "implicit"
) -> Tensor:
    """Probability of every position, with a gradient that keeps a sum fixed.

    With q = p (1 - p), for a gradient g on p:

        implicit    dL/da_j = (q_j g_j - w_j sum_i q_i g_i) / beta,  w_j = n_j q_j / sum_i n_i q_i
        detach      dL/da_j = q_j (g_j - sum_i g_i p_i / sum_i p_i) / beta

    `implicit` is the derivative of the function: zeta moves with the logits, and the expected cost
    does not. `detach` is what the authors released: zeta is taken as fixed, and p is divided by its
    sum and multiplied by the same sum without gradient, which conserves sum p in place of the cost.

    Args:
        logits: a, (N,).
        costs: n, (N,), above 0.
        budget: B, above 0 and below the sum of all costs.
        beta: Temperature of the sigmoid.
        gradient: `implicit` or `detach`.
    Returns:
        p, (N,), with sum n p = B.
    References:
        S3Delta, 2022, arXiv 2206.07382.
    """
    if gradient not in GRADIENTS:
        raise UnknownNameError(unknown_name("gradient", gradient, GRADIENTS))
    zeta = shift(logits, costs, budget, beta)
    p = torch.sigmoid((logits - zeta) / beta)
    if gradient == "detach":
        return p / p.sum() * p.sum().detach()
    # One Newton step from the root: its value is the root, its derivative the implicit one.
    slope = (costs * p * (1 - p)).sum().detach() / beta
    excess = (costs * p).sum() - budget
    zeta = zeta + excess / slope.clamp(min=torch.finfo(p.dtype).tiny)
    return torch.sigmoid((logits - zeta) / beta)


def concrete(p: Tensor, u: Tensor) -> Tensor:
    """Binary concrete gates at temperature 1: z = sigmoid(log(u p / ((1 - u) (1 - p)))).

    z is over 1/2 with probability p. u is kept off 0 and 1, where the logarithm has no value.

    Args:
        p: Probabilities, (N,).
        u: Uniform noise in [0, 1], (N,).
    Returns:
        z, (N,), in (0, 1).
    References:
        S3Delta, 2022, arXiv 2206.07382; Concrete, 2017, arXiv 1611.00712. The stretch to (l, r) of
        hard concrete gates is (0, 1) in the released code, which is none.
    Example:
        >>> concrete(torch.tensor([0.25, 0.8]), torch.tensor([0.5, 0.5])).tolist()
        [0.25, 0.800000011920929]
    """
    return torch.sigmoid(torch.logit(u, _EDGE) + torch.logit(p, _EDGE))
