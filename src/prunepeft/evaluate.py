"""What a strategy asks of training: saliency of modules, or the task metric of a placement."""

from dataclasses import dataclass, field
from typing import Protocol

from prunepeft.budget import Fidelity
from prunepeft.space import Placement


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
        """
