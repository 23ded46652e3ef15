"""Placements as few variables: each layer on or off, and one size for each kind, in all layers.

    vector = (layer 1, ..., layer L, kind 1, ..., kind M)

A layer is 0 or 1; a kind is 0 (off) or 1 + index of its size. A kind that is on has a module in
every slot of every layer that is on, all of one size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.kinds import KINDS, slot_cost
from prunepeft.space import Placement, SearchSpace, Slot
from prunepeft.strategies.choices import MAX_DRAWS, Vector
from prunepeft.strategies.resized import with_sizes

Layer = tuple[str, int]  # stack, index


@dataclass(frozen=True)
class LayerSpace:
    """Which vectors there are, and what they cost.

    A vector is valid if its cost is within the limit, and every layer and kind that is on holds a
    module; so no two valid vectors are the same placement.

    Attributes:
        slots: Candidates; those of a kind have the same sizes.
        layers: The L layers, sorted.
        kinds: The M kinds, in the order of the slots.
        sizes: For each kind its sizes, ascending.
        costs: Layer -> kind -> choice -> cost of all slots there; 0 is no module.
        limit: What a placement may cost.
    """

    slots: tuple[Slot, ...]
    layers: tuple[Layer, ...]
    kinds: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    costs: tuple[tuple[tuple[int, ...], ...], ...]
    limit: int

    @classmethod
    def of(cls, space: SearchSpace, limit: int, unit: str) -> "LayerSpace":
        """The variables of a space whose slots of a kind have the same sizes, as in `widened`."""
        layers = tuple(sorted({layer_of(s) for s in space}))
        sizes = {s.kind: s.sizes for s in space}
        costs = [[[0] * (1 + len(sizes[k])) for k in sizes] for _ in layers]
        kinds = tuple(sizes)
        for slot in space:
            row = costs[layers.index(layer_of(slot))][kinds.index(slot.kind)]
            for i, size in enumerate(slot.sizes, 1):
                row[i] += slot_cost(slot, size, unit)
        frozen = tuple(tuple(tuple(row) for row in rows) for rows in costs)
        return cls(space.slots, layers, kinds, tuple(sizes.values()), frozen, limit)

    @property
    def n_choices(self) -> tuple[int, ...]:
        """Choices of each variable."""
        return (2,) * len(self.layers) + tuple(1 + len(sizes) for sizes in self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each variable, e.g. `encoder.0` or `lora`."""
        return tuple(f"{stack}.{layer}" for stack, layer in self.layers) + self.kinds

    def cost(self, vector: Sequence[int]) -> int:
        """What a vector costs, in the unit of the budget."""
        n = len(self.layers)
        on = [row for row, switch in zip(self.costs, vector[:n], strict=True) if switch]
        return sum(row[k][choice] for row in on for k, choice in enumerate(vector[n:]))

    def decode(self, vector: Vector) -> Placement:
        """The placement of a vector."""
        n = len(self.layers)
        on = {layer for layer, switch in zip(self.layers, vector[:n], strict=True) if switch}
        sizes = {
            kind: sizes[choice - 1]
            for kind, sizes, choice in zip(self.kinds, self.sizes, vector[n:], strict=True)
            if choice
        }
        chosen = (s for s in self.slots if layer_of(s) in on and s.kind in sizes)
        return Placement({slot: sizes[slot.kind] for slot in chosen})

    def encode(self, placement: Placement) -> Vector:
        """The vector of a placement. Raises ConfigError if this space does not hold it."""
        on = {layer_of(slot) for slot in placement}
        size = {slot.kind: n for slot, n in placement.sizes.items()}
        if any(n not in self.sizes[self.kinds.index(k)] for k, n in size.items()):
            raise ConfigError(f"sizes {size} are not among {dict(self._sizes_by_kind())}.")
        kinds = (sizes.index(size[k]) + 1 if k in size else 0 for k, sizes in self._sizes_by_kind())
        vector = (*(int(layer in on) for layer in self.layers), *kinds)
        if self.decode(vector) != placement:
            raise ConfigError(
                "the placement has modules of several sizes, or not the same kinds in all its "
                "layers; method autopeft can only say the same for all layers."
            )
        return vector

    def codes(self, vectors: Sequence[Vector]) -> Tensor:
        """The vectors in [0, 1]: choice / (choices - 1), (N, L + M) float64."""
        last = torch.tensor(self.n_choices, dtype=torch.float64) - 1
        return torch.tensor(vectors, dtype=torch.float64).reshape(-1, len(last)) / last

    def costs_of(self, codes: Tensor) -> Tensor:
        """What vectors cost, from their codes (..., L + M); (...)."""
        n = len(self.layers)
        choices = (codes * (codes.new_tensor(self.n_choices) - 1)).round()
        total = codes.new_zeros(codes.shape[:-1])
        for k in range(len(self.kinds)):
            table = codes.new_tensor([row[k] for row in self.costs]).T  # (choices, L)
            total = total + (table[choices[..., n + k].long()] * choices[..., :n]).sum(-1)
        return total

    def is_valid(self, vector: Sequence[int]) -> bool:
        """Whether a vector is within the limit, and nothing of it is on without a module."""
        return any(vector) and self._trimmed(vector) == vector and self.cost(vector) <= self.limit

    def neighbours(self, vector: Vector) -> list[Vector]:
        """All valid vectors that differ in exactly one variable."""
        changed = (
            (*vector[:i], choice, *vector[i + 1 :])
            for i, n in enumerate(self.n_choices)
            for choice in range(n)
            if choice != vector[i]
        )
        return [v for v in changed if self.is_valid(v)]

    def smallest(self) -> Vector:
        """The cheapest vector that is not empty: one layer, one kind, its smallest size."""
        n, m = len(self.layers), len(self.kinds)
        homes = [(i, k) for i in range(n) for k in range(m) if self._has(i, k)]
        layer, kind = min(homes, key=lambda home: self.costs[home[0]][home[1]][1])
        return tuple(int(j in (layer, n + kind)) for j in range(n + m))

    def draw(self, generator: torch.Generator) -> Vector:
        """A random valid vector, each as likely.

        If all of 100 draws cost too much, the last one is lowered one variable after the other.
        """
        choices = self.n_choices
        for _ in range(MAX_DRAWS):
            uniform = torch.rand(len(choices), generator=generator).tolist()
            vector = tuple(int(u * n) for u, n in zip(uniform, choices, strict=True))
            if self.is_valid(vector):
                return vector
        return self._lowered(vector, generator)

    def draw_new(self, n: int, known: set[Vector], generator: torch.Generator) -> list[Vector]:
        """Up to `n` random valid vectors that are neither known nor equal.

        Where 100 draws find none, a neighbour of what there is is taken; if all those are known,
        the space is taken as used up.
        """
        found: list[Vector] = []
        for _ in range(n):
            seen = known | set(found)
            draws = (self.draw(generator) for _ in range(MAX_DRAWS))
            new = next((v for v in draws if v not in seen), None)
            if new is None:
                near = self._near(seen)
                if not near:
                    break
                new = near[int(torch.randint(len(near), (), generator=generator))]
            found.append(new)
        return found

    def _near(self, seen: Iterable[Vector]) -> list[Vector]:
        return sorted({v for w in seen for v in self.neighbours(w)} - set(seen))

    def _sizes_by_kind(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(zip(self.kinds, self.sizes, strict=True))

    def _has(self, layer: int, kind: int) -> bool:
        return self.costs[layer][kind][-1] > 0

    def _trimmed(self, vector: Sequence[int]) -> Vector:
        """Off is what holds no module; () is the empty placement."""
        n = len(self.layers)
        layers = [i for i in range(n) if vector[i]]
        kinds = [k for k in range(len(self.kinds)) if vector[n + k]]
        homes = {(i, k) for i in layers for k in kinds if self._has(i, k)}
        on = {i for i, _ in homes} | {n + k for _, k in homes}
        return tuple(choice if j in on else 0 for j, choice in enumerate(vector)) if homes else ()

    def _lowered(self, vector: Vector, generator: torch.Generator) -> Vector:
        now = list(vector)
        while any(now) and self.cost(now) > self.limit:
            on = [i for i, choice in enumerate(now) if choice]
            now[on[int(torch.randint(len(on), (), generator=generator))]] -= 1
        return self._trimmed(now) or self.smallest()


def layer_of(slot: Slot) -> Layer:
    """Stack and index of the layer of a slot."""
    return slot.sites[0].stack, slot.layer


def widened(space: SearchSpace, limit: int, unit: str) -> SearchSpace:
    """The same slots with the sizes of the method, and the scaling that they had.

    Kinds with one size get all halves of it (rounded down) to 1; and twice, four times, ... of it
    while the module alone fits the budget in some layer and is no wider than the narrowest layer it
    sits on, so that few layers can use the budget up. Where sizes cost nothing (a budget in
    modules) there are no larger ones. Several sizes are a choice that was made; they stay, as far
    as all slots of the kind allow them.

    Raises:
        ConfigError: if there is no such size.
    """
    by_kind: dict[str, list[Slot]] = {}
    for slot in space:
        by_kind.setdefault(slot.kind, []).append(slot)
    sizes = {kind: _sizes(kind, slots, limit, unit) for kind, slots in by_kind.items()}
    return SearchSpace(tuple(with_sizes(s, sizes[s.kind]) for s in space))


def _sizes(kind: str, slots: Sequence[Slot], limit: int, unit: str) -> tuple[int, ...]:
    common = set(slots[0].sizes).intersection(*(s.sizes for s in slots))
    if not common:
        raise ConfigError(
            f"method autopeft uses one size of {kind} in all layers, but no size is allowed in all "
            f"of its {len(slots)} places; give sizes.{kind}."
        )
    if len(common) > 1 or not KINDS.get(kind).sized:
        return tuple(sorted(common))
    given = min(common)
    width = min(min(site.d_in, site.d_out) for s in slots for site in s.sites)
    found, size = {given}, given
    while size := size // 2:
        found.add(size)
    while _can_double(slots, max(found), limit, unit, width):
        found.add(2 * max(found))
    return tuple(sorted(found))


def _can_double(slots: Sequence[Slot], size: int, limit: int, unit: str, width: int) -> bool:
    now = min(slot_cost(s, size, unit) for s in slots)
    twice = min(slot_cost(s, 2 * size, unit) for s in slots)
    return 2 * size <= width and now < twice <= limit
