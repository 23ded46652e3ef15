"""The placements within a budget as vectors: for each slot no module, or one of its sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from prunepeft.kinds import slot_cost
from prunepeft.space import Placement, SearchSpace, Slot

Vector = tuple[int, ...]  # of `Choices`: for each slot 0 (no module) or 1 + index of its size
MAX_DRAWS = 100


class Coding(Protocol):
    """Placements within a budget as vectors.

    Attributes:
        slots: The candidates.
        limit: What a placement may cost.
    """

    slots: tuple[Slot, ...]
    limit: int

    def cost(self, vector: Sequence[int]) -> int:
        """What a vector costs."""

    def decode(self, vector: Vector) -> Placement:
        """The placement of a vector."""

    def encode(self, placement: Placement) -> Vector:
        """The vector of a placement."""

    def draw_new(self, n: int, known: set[Vector], generator: torch.Generator) -> list[Vector]:
        """Up to `n` random vectors that are neither known nor equal; fewer if none is found."""


@dataclass(frozen=True)
class Choices:
    """What may be chosen, and what it costs.

    Attributes:
        slots: The n slots.
        costs: For each slot what its choices cost, from no module (0) to the largest size.
        limit: What a placement may cost.
    """

    slots: tuple[Slot, ...]
    costs: tuple[tuple[int, ...], ...]
    limit: int

    @classmethod
    def of(cls, space: SearchSpace, limit: int, unit: str) -> "Choices":
        """The choices of a search space under a budget of `limit` in `unit`."""
        costs = tuple((0, *(slot_cost(s, size, unit) for size in s.sizes)) for s in space)
        return cls(space.slots, costs, limit)

    def cost(self, vector: Sequence[int]) -> int:
        """What a vector costs."""
        return sum(row[choice] for row, choice in zip(self.costs, vector, strict=True))

    def decode(self, vector: Vector) -> Placement:
        """The placement of a vector."""
        chosen = zip(self.slots, vector, strict=True)
        return Placement({slot: slot.sizes[k - 1] for slot, k in chosen if k})

    def encode(self, placement: Placement) -> Vector:
        """The vector of a placement of these slots."""
        sizes = placement.sizes
        return tuple(1 + s.sizes.index(sizes[s]) if s in sizes else 0 for s in self.slots)

    def draw(self, generator: torch.Generator) -> Vector:
        """A random placement: a choice for each slot, each as likely, then cut or filled."""
        uniform = torch.rand(len(self.slots), generator=generator).tolist()
        vector = [int(u * len(row)) for u, row in zip(uniform, self.costs, strict=True)]
        return self.repair(vector, generator)

    def draw_new(self, n: int, known: set[Vector], generator: torch.Generator) -> list[Vector]:
        """Up to `n` random vectors that are neither known nor equal; fewer if none is found."""
        found: list[Vector] = []
        for _ in range(n):
            draws = (self.draw(generator) for _ in range(MAX_DRAWS))
            new = next((v for v in draws if v not in known and v not in found), None)
            if new is None:
                break
            found.append(new)
        return found

    def repair(
        self, vector: Sequence[int], generator: torch.Generator, fixed: int | None = None
    ) -> Vector:
        """Bring a vector into the budget and use the budget up, slot by slot in random order.

        While it costs too much, the next slot falls to the largest size with which all fits, else
        to none. Then each slot rises to the most expensive size that still fits: no module can be
        added or enlarged within the budget, except where that costs nothing.

        Args:
            vector: n choices.
            generator: Order of the slots.
            fixed: A slot that stays as it is; it must fit alone.
        """
        now = list(vector)
        order = torch.randperm(len(now), generator=generator).tolist()
        order = [i for i in order if i != fixed]
        room = self.limit - self.cost(now)
        for i in order:
            if room >= 0:
                break
            room += self.costs[i][now[i]]
            now[i] = max((k for k in range(now[i]) if self.costs[i][k] <= room), default=0)
            room -= self.costs[i][now[i]]
        for i in order:
            row = self.costs[i]
            most = max(c for c in row if c <= room + row[now[i]])
            if most > row[now[i]]:
                equal = [k for k, c in enumerate(row) if c == most]
                room -= most - row[now[i]]
                now[i] = equal[int(torch.randint(len(equal), (), generator=generator))]
        return tuple(now)
