"""A backend runs a batch of trials; the serial one asks the evaluator for one after the other."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from prunepeft.budget import Fidelity
from prunepeft.evaluate import Evaluator, Tried
from prunepeft.space import Placement


@dataclass(frozen=True)
class Batch:
    """Trials that do not depend on each other.

    Attributes:
        placements: What is tried, in order.
        names: One for each, for the progress line.
        fidelity: Share of the rows, and passes over them.
        seed: First values, data subset, order and dropout.
        steps: Optimiser steps of one trial.
    """

    placements: Sequence[Placement]
    names: Sequence[str]
    fidelity: Fidelity
    seed: int
    steps: int

    @property
    def common(self) -> dict[str, Any]:
        """Arguments that all trials share."""
        return {"fidelity": self.fidelity, "seed": self.seed}


class Backend(ABC):
    """Where trials run. What they find does not depend on it. A context manager."""

    name: ClassVar[str]

    @abstractmethod
    def trials(self, evaluator: Evaluator, batch: Batch) -> Generator[Tried, None, None]:
        """The result of every trial, in the order of the batch, however they are finished."""

    def close(self) -> None:  # noqa: B027 - the serial one has nothing to let go of
        """Let go of all workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Serial(Backend):
    """One trial after the other, in this process."""

    name: ClassVar[str] = "serial"

    def trials(self, evaluator: Evaluator, batch: Batch) -> Generator[Tried, None, None]:
        """See `Backend.trials`."""
        for placement, name in zip(batch.placements, batch.names, strict=True):
            yield evaluator.trial(placement, name=name, **batch.common)
