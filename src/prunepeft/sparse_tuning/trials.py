"""IST's judgement of layers beside an ordinary training, in which all layers go on learning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.errors import StateError
from prunepeft.processes import share
from prunepeft.sparse_tuning.ist import IstSettings, LayerSampler
from prunepeft.sparse_tuning.layers import peft_layers
from prunepeft.sparse_tuning.tuning import loss_without

SETTINGS = IstSettings(reward="relative", every=4)


class LayerTrials:
    """Turns layers down for a moment while a model trains, and learns what the loss says to it.

    The trials run in the first and second optimiser step (modules that start as the identity say
    nothing in the first) and then every `settings.every` steps, on the batch that was just trained
    on (the last micro-batch of the step), without dropout and without gradients; gradients and
    weights stay as they are. Under data parallel the losses of the main process count.

    Args:
        model: With trainable PEFT modules, not wrapped for data parallel.
        settings: `suppressed`, `beta`, `every`, `trials`, `score_lr` and `reward` are read.
        seed: Fixes which layers are turned down together.
    Raises:
        ConfigError: if no layer carries trainable modules; in `step`, if the model returns no loss.
    """

    def __init__(self, model: nn.Module, settings: IstSettings = SETTINGS, seed: int = 0) -> None:
        self.model, self.settings = model, settings
        self.layers = peft_layers(model)
        self.sampler = LayerSampler(len(self.layers), settings, seed)
        self._hook: Any = None
        self._batch: Mapping[str, Any] | None = None

    def start(self) -> None:
        """Begin to look at the batches of the model."""
        self.reset()
        self._hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def stop(self) -> None:
        """Look no more; scores stay."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._batch = None

    def reset(self) -> None:
        """Forget the scores."""
        self.sampler = LayerSampler(len(self.layers), self.settings, self.sampler.seed)

    def step(self) -> None:
        """Once per optimiser step, before the optimiser: run the trials if they are due."""
        every = self.settings.every
        if self.sampler.step == 0 or self.sampler.step % every == 1 % every:
            self._judge()
        self.sampler.step += 1

    def importance(self, units: Mapping[str, Sequence[nn.Parameter]]) -> Tensor:
        """Weight with which IST would train the layer of each unit.

        Args:
            units: Unit id -> its parameters.
        Returns:
            (N,) float64 in (0, 1); 0.5 for a unit that belongs to no one layer.
        """
        weights = torch.sigmoid(-self.sampler.dispensability).tolist()
        pairs = zip(self.layers, weights, strict=True)
        found = {id(p): weight for layer, weight in pairs for p in layer.parameters}
        values = [[found[id(p)] for p in unit if id(p) in found] for unit in units.values()]
        return torch.tensor([v[0] if v else 0.5 for v in values], dtype=torch.float64)

    def _see(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if module.training:
            self._batch = kwargs

    def _judge(self) -> None:
        if not self._batch:
            raise StateError(
                "no batch was seen before this optimiser step; train the model itself, in training "
                "mode and with named inputs (model(**batch)), after the recorder was entered."
            )
        sets = self.sampler.trials()
        without = [[self.layers[i] for i in chosen] for chosen in sets]
        losses = [loss_without(self.model, self._batch, some, self.settings) for some in without]
        self.sampler.update(sets, share(losses))
