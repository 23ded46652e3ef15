"""How far weights are from where they change nothing."""

from torch import Tensor


def off_neutral(weight: Tensor, neutral: Tensor | float) -> Tensor:
    """How far a tensor is from its neutral value, see `Kind.neutral`."""
    if isinstance(neutral, Tensor):
        return weight - neutral.to(weight)
    return weight - neutral if neutral else weight
