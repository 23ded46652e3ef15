"""What a probe may do with the plain base model: look, take gradients, train something on it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Recorder(Protocol):
    """What passes tell of their progress; a part of `Watcher`."""

    def mark(self) -> None:
        """An epoch begins; remember the state."""

    def reset(self) -> None:
        """The epoch is run again because memory ran out; back to the mark."""

    def step(self) -> None:
        """Once per step: gradients are summed over micro-batches, not yet clipped or used."""


class Passes(Protocol):
    """How a probe may run rows through a model.

    Attributes:
        model: The base model with its head.
        head: Names of modules trained in full.
        task_type: peft task type.
        seed: Of everything random.
        n_steps: Steps of all epochs together.
        device: Where to compute.
        whole: Whether gradients of a step come in one piece, on one process.
    """

    model: nn.Module
    head: list[str]
    task_type: str | None
    seed: int
    n_steps: int
    device: str
    whole: bool

    def look(self, net: nn.Module, on_batch: Callable[[Mapping[str, Tensor]], bool]) -> None:
        """Forward passes over the rows, without dropout; every process sees all of them.

        Args:
            net: The base model, or one made of it.
            on_batch: Told of each batch before its pass; False ends it all.
        """

    def gradients(self, weights: Sequence[nn.Parameter], recorder: Recorder) -> None:
        """One epoch of forward and backward passes over the base model; nothing learns."""

    def learn_head(self) -> None:
        """Train the task head of the base model alone, if there is one, for all epochs."""

    def learn(
        self,
        net: nn.Module,
        *,
        recorder: Recorder | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Train what is trainable of a model for all epochs.

        Args:
            net: The base model, or one made of it.
            recorder: Told of every step.
            after_step: Called after every step of the optimizer, while gradients are there.
        """


class Probe(Protocol):
    """Finds something out on the plain base model.

    Attributes:
        config: Everything that what is found depends on, as plain JSON values.
    """

    config: dict[str, Any]

    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """What was found, on the CPU. Modules put on the model must be off again."""
