"""What a strategy asks of training: saliency of modules, or the task metric of a placement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from prunepeft.budget import Fidelity
from prunepeft.probes import Probe
from prunepeft.space import Placement

if TYPE_CHECKING:
    from peft import PeftModel

    from prunepeft.structured.cut import Cut


@dataclass(frozen=True)
class Target:
    """What is trained towards.

    Attributes:
        metric: Name of the metric that decides.
        greater_is_better: Its direction.
        head: Names of modules trained in full.
        task_type: peft task type.
        stratify: Whether subsets of the rows keep the shares of the labels.
        search_lr: Learning rate while searching.
        context: Everything else a result depends on (model, data, settings), for its key.
    """

    metric: str
    greater_is_better: bool
    head: list[str]
    task_type: str | None
    stratify: bool
    search_lr: float
    context: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """Saliency of every module of a placement after a short training.

    Attributes:
        saliency: Criterion -> slot id -> score; higher is more worth keeping.
        key: Name of this run in the journal; with `keep` its weights are stored under it.
        loss: Mean training loss.
        seconds, steps, rows, peak_memory_bytes: What it cost.
    """

    saliency: dict[str, dict[str, float]]
    key: str = ""
    loss: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    peak_memory_bytes: int = 0


class Watcher(Protocol):
    """Looks on, and may act, while a supernet trains.

    Attributes:
        config: Everything that what is found depends on, as plain JSON values.
    """

    config: dict[str, Any]

    def attach(self, net: "PeftModel") -> None:
        """Before the optimizer is made: hooks, and trainable parameters (`net.add_module`)."""

    def start(self, steps: int) -> None:
        """After the optimizer is made; so many optimiser steps are to come."""

    def mark(self) -> None:
        """An epoch begins; remember the state."""

    def reset(self) -> None:
        """The epoch is run again because memory ran out; back to the mark."""

    def step(self) -> bool | None:
        """Once per optimiser step: gradients are summed over micro-batches and not yet clipped.

        Returns:
            True if nothing more is to be learnt: the training ends with this step.
        """

    def stop(self) -> dict[str, Tensor]:
        """Take hooks and parameters off; what was found, on the CPU."""

    def abandon(self) -> None:
        """Take hooks and parameters off after an error."""


@dataclass(frozen=True, eq=False)
class Watched:
    """What a watcher found in a training, or a probe.

    Attributes:
        tensors: By the names of the watcher or probe.
        key: Name of this run in the journal; of a training the weights at its end are stored
            under it.
        loss: Mean training loss of the last epoch.
        seconds, steps, rows, peak_memory_bytes: What it cost.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    loss: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Tried:
    """A placement trained for a short while and measured.

    Attributes:
        metrics: Validation metrics at the end; empty if the trial failed.
        error: Why it failed; empty if it did not.
        key: Name of this run in the journal. No weights are kept.
        loss: Mean training loss of the last epoch.
        seconds, steps, rows, peak_memory_bytes: What it cost; a failed trial counts all steps it
            was to take.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    key: str = ""
    loss: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """A trained placement.

    Attributes:
        metrics: Validation metrics of the best epoch.
        best_epoch: From 1.
        curve: One entry an epoch: `epoch`, `train_loss`, `validation_loss` and the metrics.
        n_params, head_params: Counted trainable parameters in modules and in the task head.
        key: Name in the journal; the best weights are stored under it.
        seconds, steps, peak_memory_bytes: What it cost.
    """

    metrics: dict[str, float]
    best_epoch: int
    curve: list[dict[str, float]] = field(default_factory=list)
    n_params: int = 0
    head_params: int = 0
    key: str = ""
    seconds: float = 0.0
    steps: int = 0
    peak_memory_bytes: int = 0


class Evaluator(Protocol):
    """What a strategy may ask for. Calls are pure: same arguments, same answer."""

    def score(
        self,
        placement: Placement,
        criteria: tuple[str, ...],
        *,
        name: str,
        fidelity: Fidelity,
        seed: int,
        init_seed: int,
        start: str = "",
        keep: bool = False,
        settle: float | None = None,
    ) -> Scored:
        """Train briefly and score every module.

        Args:
            placement: The supernet as it stands.
            criteria: Names of the criteria to score.
            name: For the progress line.
            fidelity: Share of the rows, and passes over them.
            seed: Data subset, order and dropout.
            init_seed: First values of the modules.
            start: Key of an earlier run to go on from, instead of first values.
            keep: Store the weights at the end under the result's key.
            settle: End the training when the rankings have settled, see `Settling`.
        """

    def watch(
        self,
        placement: Placement,
        watcher: Watcher,
        *,
        name: str,
        fidelity: Fidelity,
        seed: int,
        init_seed: int,
    ) -> Watched:
        """Train briefly while a watcher looks on; the weights at the end are kept.

        Args:
            placement: What is trained.
            watcher: Finds something out, or acts.
            name: For the progress line.
            fidelity: Share of the rows, and passes over them.
            seed: Data subset, order and dropout.
            init_seed: First values of the modules.
        """

    def calibrate(self, probe: Probe, *, name: str, fidelity: Fidelity, seed: int) -> Watched:
        """Find something out on the base model, which stays as it was; no weights are kept.

        Args:
            probe: What to find out.
            name: For the progress line.
            fidelity: Share of the rows, and passes over them where something learns.
            seed: Data subset, order and dropout.
        """

    def trial(self, placement: Placement, *, name: str, fidelity: Fidelity, seed: int) -> Tried:
        """Train a placement from first values for a short while, and measure it.

        What goes wrong because of the placement (the loss is not finite, memory runs out, the
        model stops with an error) is a result; what is wrong with the run is raised.

        Args:
            placement: What is trained.
            name: For the progress line.
            fidelity: Share of the rows, and passes over them.
            seed: First values, data subset, order and dropout.
        """

    def carry(
        self,
        placement: Placement,
        key: str,
        cut: "Cut | None",
        keep_ranks: Mapping[str, Sequence[int]],
    ) -> tuple[Placement, str]:
        """Cut the base for good, and take trained modules over to it.

        Args:
            placement: What was trained in the run `key`.
            key: Of a run whose weights were kept.
            cut: What stays of the base; None leaves it whole.
            keep_ranks: Slot id -> ranks that stay; slots that are not named go.
        Returns:
            The placement on the cut base, and the key of its weights.
        """

    def merge(self, placement: Placement, key: str, cut: "Cut | None") -> None:
        """Cut the base for good, and merge trained modules and their head into it.

        Args:
            placement: What was trained in the run `key`; its kinds must be mergeable.
            key: Of a run whose weights were kept.
            cut: What stays of the base; None leaves it whole.
        """
