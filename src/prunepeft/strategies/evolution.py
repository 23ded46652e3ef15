"""Regularised evolution: the best of a few parents is changed in one slot, and the oldest dies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunepeft.space import Placement
from prunepeft.strategies.black_box import BlackBox, at_least, decoded
from prunepeft.strategies.choices import MAX_DRAWS, Choices, Vector
from prunepeft.strategies.history import History, Trial


@dataclass(frozen=True)
class Evolution(BlackBox):
    """Regularised (ageing) evolution.

    The first `population` placements are random. Then each new one is a change of the best of
    `sample` members drawn with replacement; it joins, and the oldest member leaves, however good.
    A change gives one slot another size, or takes its module away, or gives it one; the others make
    room or use up what is free, see `Choices.repair`. No placement is tried twice.

    Attributes:
        population: Members alive at a time.
        sample: Members that compete to be the parent.
    References:
        Real et al., 2019, arXiv 1802.01548, algorithm 1. The budget and its repair are not in the
        paper. Failed trials never join.
    """

    name: ClassVar[str] = "evolution"

    population: int = 12
    sample: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("population", self.population, 2)
        at_least("sample", self.sample, 1)

    def alive(self, history: History) -> list[Trial]:
        """The members: the youngest trials that did not fail, oldest first."""
        return [t for t in history.trials if t.metric is not None][-self.population :]

    def propose(self, history: History, n: int, generator: torch.Generator) -> list[Placement]:
        """See `BlackBox.propose`. After the first population, one at a time."""
        choices, known = history.choices, history.known()
        missing = self.population - len(history.trials)
        members = self.alive(history)
        if missing > 0 or not members:
            n = min(n, max(missing, 1))
            return decoded(choices, choices.draw_new(n, known, generator))
        for _ in range(MAX_DRAWS):
            picks = torch.randint(len(members), (self.sample,), generator=generator).tolist()
            parent = history.best_first([members[i] for i in picks])[0]
            child = mutate(choices, parent.vector, generator)
            if any(child) and child not in known:
                return decoded(choices, [child])
        return decoded(choices, choices.draw_new(1, known, generator))


def mutate(choices: Choices, vector: Sequence[int], generator: torch.Generator) -> Vector:
    """Another choice for one slot, all slots and then all its choices as likely; then repaired.

    The result is empty if the only module that fits was taken away.

    Args:
        choices: What may be chosen.
        vector: n choices within the budget.
        generator: Of everything random.
    """
    options = [
        [k for k, cost in enumerate(row) if cost <= choices.limit and k != now]
        for row, now in zip(choices.costs, vector, strict=True)
    ]
    slots = [i for i, ks in enumerate(options) if ks]
    slot = slots[int(torch.randint(len(slots), (), generator=generator))]
    choice = options[slot][int(torch.randint(len(options[slot]), (), generator=generator))]
    changed = [choice if i == slot else k for i, k in enumerate(vector)]
    return choices.repair(changed, generator, fixed=slot)
