"""A map of values to standard normal ones by their ranks."""

import torch
from torch import Tensor


class Copula:
    """Map a column of values to a standard normal one by its ranks.

    y -> Phi^-1((r - 1/2) / N), r the rank of y among the N values, from 1, the mean rank of equal
    ones. Between two values it is a line, and beyond the ends a line of the mean slope, so that
    any other value, as that of a reference point, goes the same way. It never falls.

    Args:
        values: (N,), N >= 1.
    Example:
        >>> [round(v, 3) for v in Copula(torch.tensor([0.70, 0.80, 0.90, 0.85]))
        ...     (torch.tensor([0.70, 0.80, 0.90, 0.85])).tolist()]
        [-1.15, -0.319, 1.15, 0.319]
    """

    def __init__(self, values: Tensor) -> None:
        known, counts = values.double().unique(return_counts=True)  # ascending
        middle = (counts.cumsum(0) - counts / 2) / counts.sum()
        mapped = torch.special.ndtri(middle)
        slope = (mapped[-1] - mapped[0]) / (known[-1] - known[0]) if len(known) > 1 else 1.0
        # One more knot a mean slope away on either side, so that there are always two.
        span = known[-1] - known[0] if len(known) > 1 else known.new_ones(())
        self.known = torch.cat([known[:1] - span, known, known[-1:] + span])
        self.mapped = torch.cat([mapped[:1] - slope * span, mapped, mapped[-1:] + slope * span])

    def __call__(self, values: Tensor) -> Tensor:
        """Values of any shape, mapped."""
        values = values.double()
        right = torch.searchsorted(self.known, values.contiguous()).clamp(1, len(self.known) - 1)
        x0, x1 = self.known[right - 1], self.known[right]
        y0, y1 = self.mapped[right - 1], self.mapped[right]
        return y0 + (values - x0) / (x1 - x0) * (y1 - y0)
