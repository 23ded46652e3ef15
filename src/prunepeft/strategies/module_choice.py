"""Base of the allocators that choose modules and treat those chosen alike."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.space import MAX_SIZE, Slot
from prunepeft.strategies.allocation import Rows, best_first, by_share, uniform_size, within
from prunepeft.strategies.allocator import Allocator, rank_rows
from prunepeft.strategies.base import Problem


@dataclass(frozen=True)
class ModuleChoice(Allocator):
    """Which modules stay; not how their ranks differ.

    Attributes:
        keep: Share that stays, of what `chosen` says, at the rank that uses the budget up. None: at
            the size of the space, the best first, each that fits.
    """

    default_max: ClassVar[float] = float(MAX_SIZE)

    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"allocate.keep must be in (0, 1]; got {self.keep!r}.")

    @abstractmethod
    def chosen(self, importance: Mapping[str, float], rows: Rows) -> list[str]:
        """Slots that stay if `keep` is given."""

    def order(self, scores: Mapping[str, float], rows: Rows) -> list[str]:
        """See `Allocator.order`."""
        return super().order(scores, rows) if self.keep is None else self.chosen(scores, rows)

    def rows(self, problem: Problem, slots: Sequence[Slot]) -> tuple[Rows, float]:
        """See `Allocator.rows`; without `keep` the largest rank is the size of the space."""
        if problem.unit == "modules" or self.keep is not None:
            return super().rows(problem, slots)
        rows = rank_rows(slots, problem.unit)
        rows = {s.id: rows[s.id][: s.sizes[-1] + 1] for s in slots}
        return rows, uniform_size(rows, problem.limit)

    def sizes(
        self, slots: Mapping[str, Slot], found: Mapping[str, Tensor], rows: Rows, limit: int
    ) -> dict[str, int]:
        """See `Allocator.sizes`."""
        importance = {i: self.importance(slot, found[i]) for i, slot in slots.items()}
        if self.keep is None:
            order = sorted(importance, key=lambda i: -importance[i])
            return best_first(order, rows, limit)
        able = within(rows, limit)
        stay = self.chosen({i: x for i, x in importance.items() if i in able}, rows)
        return by_share(dict.fromkeys(stay, 1.0), {i: rows[i] for i in stay}, limit)
