"""Random search: placements drawn at random, each using the budget up; the best one wins."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunepeft.space import Placement
from prunepeft.strategies.black_box import BlackBox, decoded
from prunepeft.strategies.history import History


@dataclass(frozen=True)
class RandomSearch(BlackBox):
    """Random search within the budget, the yardstick of every other search.

    Each slot draws no module or one of its sizes, all as likely; then the placement is cut to the
    budget or filled up to it, see `Choices.repair`. None is tried twice. Settings: see `BlackBox`.

    References:
        Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 13, 2012. The
        budget is not in the paper.
    """

    name: ClassVar[str] = "random"

    def propose(self, history: History, n: int, generator: torch.Generator) -> list[Placement]:
        """See `BlackBox.propose`."""
        choices = history.choices
        return decoded(choices, choices.draw_new(n, history.known(), generator))
