"""IST at work on a model: before each step some layers are chosen, now and then judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.errors import ConfigError
from prunepeft.processes import share
from prunepeft.sparse_tuning.ist import IstSettings, LayerSampler
from prunepeft.sparse_tuning.layers import (
    PeftLayer,
    evaluating,
    peft_layers,
    release_state,
    suppressed,
    train_only,
)


class SparseTuning:
    """Trains the modules of a few layers in each optimiser step.

    Make it while everything that is to be trained requires gradients, and the optimiser too. Then
    call `begin_step` before the first forward pass of every optimiser step, however many
    micro-batches it has, and `restore` at the end.

    All processes of a data-parallel training do the same: draws depend on the seed and the step,
    and the losses of the trials are those of the main process.

    Args:
        model: With PEFT modules, not wrapped for data parallel.
        settings: See there.
        seed: Fixes all draws; that of the main process counts.
        rows: Training rows, by number, for the trials.
        collator: List of rows to a batch for the model, with its labels.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: IstSettings,
        seed: int,
        rows: Any,
        collator: Callable[[list[Any]], Mapping[str, Any]],
    ) -> None:
        self.model, self.settings = model, settings
        self.rows, self.collator = rows, collator
        self.layers = peft_layers(model)
        self.sampler = LayerSampler(len(self.layers), settings, share(seed))
        self.active = tuple(range(len(self.layers)))
        self._marked = self.state_dict()

    @property
    def importance(self) -> dict[str, float]:
        """Layer -> how much the loss suffers when its modules are turned down, as learnt so far."""
        scores = self.sampler.dispensability.tolist()
        return {layer.name: 0.0 - s for layer, s in zip(self.layers, scores, strict=True)}

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose the layers of this optimiser step, after a new judgement if one is due."""
        if self.sampler.is_due:
            sets = self.sampler.trials()
            batch = self._batch()
            self.sampler.update(sets, share([self._loss(batch, chosen) for chosen in sets]))
        self.active = self.sampler.choose()
        train_only(self.layers, self.active)
        release_state(optimizer, self.layers, self.active, self.settings.optimizer_state)

    def restore(self) -> None:
        """Let all layers train again."""
        for parameter in (p for layer in self.layers for p in layer.parameters):
            parameter.requires_grad_(True)

    def mark(self) -> None:
        """Remember this moment."""
        self._marked = self.state_dict()

    def step(self) -> None:
        """Gradients of a step are there; nothing is to be done (see `Watcher`)."""

    def reset(self) -> None:
        """Back to the mark, before a pass that is repeated."""
        self.restore()
        self.load_state_dict(self._marked)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, as plain JSON values."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state_dict` gave."""
        self.sampler.load_state_dict(state)

    def _batch(self) -> dict[str, Any]:
        numbers = self.sampler.probe_rows(len(self.rows))
        batch = self.collator([self.rows[i] for i in numbers])
        device = next(self.model.parameters()).device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _loss(self, batch: Mapping[str, Any], chosen: tuple[int, ...]) -> float:
        """Loss with the modules of these layers turned down."""
        return loss_without(self.model, batch, [self.layers[i] for i in chosen], self.settings)


def layer_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    settings: IstSettings | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Layer -> importance of its modules as they are now: IST's scores without IST's training.

    Args:
        model: With trained PEFT modules.
        batches: With labels, on the model's device; each is one update of the scores. Give some
            tens of them, or a larger `score_lr`.
        settings: `suppressed`, `beta`, `trials`, `score_lr` and `reward` are read.
        seed: Fixes which layers are turned down together.
    Returns:
        `<stack>.<number>` -> importance; higher = more worth keeping. Zero is no opinion.
    Raises:
        ConfigError: if no layer carries trainable modules, or batches have no labels.
    """
    settings, layers = settings or IstSettings(), peft_layers(model)
    sampler = LayerSampler(len(layers), settings, seed)
    for sampler.step, batch in enumerate(batches):
        sets = sampler.trials()
        without = [[layers[i] for i in chosen] for chosen in sets]
        sampler.update(sets, [loss_without(model, batch, some, settings) for some in without])
    scores = sampler.dispensability.tolist()
    return {layer.name: 0.0 - s for layer, s in zip(layers, scores, strict=True)}


def loss_without(
    model: nn.Module, batch: Mapping[str, Any], layers: Sequence[PeftLayer], settings: IstSettings
) -> float:
    """Loss with the modules of these layers turned down."""
    modules = [module for layer in layers for module in layer.modules]
    with evaluating(model), suppressed(modules, settings.beta):
        return loss_of(model, batch)


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """What the model itself returns as `loss`. Raises ConfigError if it returns none."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"IST judges layers by the loss that the model returns, and {type(model).__name__} "
            "returned none; let batches hold labels, or use sampling='uniform', which needs none."
        )
    return float(loss)
