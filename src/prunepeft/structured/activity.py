"""What goes into linear layers, and the gradient there: sums over the valid tokens of a step."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.structured.base_layers import BaseLayer, add_over_processes

IGNORED = -100


class Activity:
    """Hooks on linear layers that sum over valid tokens; one step's sums lie in `layer.inputs`.

    Per layer, each (d_in,): `absolute` = sum of |x|, `square` = sum of x^2, and with `gradients`
    `gradient` = sum of |dL/du|, where x is the input before a mask of `Masks` multiplies it and
    u the input after it; `count` = number of tokens, (). Neither shrinks with the mask, so a
    masked unit is judged as if it were there. Padding counts for nothing.

    Args:
        net: The model that is called with the batch.
        layers: Which layers.
        sources: Path -> "encoder" or "decoder": whose tokens enter the layer.
        gradients: Whether to look at gradients too. Where nothing before a layer trains, the
            backward pass is led up to it.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Mapping[str, tuple[BaseLayer, nn.Module]],
        sources: Mapping[str, str],
        gradients: bool,
    ) -> None:
        self.net = net
        self.layers = layers
        self.sources = sources
        self.gradients = gradients
        self._valid: dict[str, Tensor | None] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Install the hooks; call it after those of the masks are installed."""
        add = self._handles.append
        add(self.net.register_forward_pre_hook(self._read_batch, with_kwargs=True))
        for path, (layer, module) in self.layers.items():
            add(module.register_forward_pre_hook(partial(self._see, path, layer), prepend=True))
            if self.gradients:
                add(module.register_forward_pre_hook(partial(self._ask, path, layer)))

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        self._valid.clear()

    def clear(self) -> None:
        """Forget the step."""
        for layer, _ in self.layers.values():
            layer.inputs.clear()

    def pool(self) -> None:
        """Add the sums of all processes."""
        for layer, _ in self.layers.values():
            add_over_processes(layer.inputs[name] for name in sorted(layer.inputs))

    def _read_batch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask, decoder = kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")
        config = getattr(self.net, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            decoder = mask
        elif decoder is None and isinstance(labels := kwargs.get("labels"), Tensor):
            decoder = labels.ne(IGNORED)
        self._valid = {"encoder": mask, "decoder": decoder}

    def _tokens(self, path: str, x: Tensor) -> Tensor:
        """1 for a valid token, 0 for padding, (..., 1)."""
        mask = self._valid.get(self.sources[path])
        if mask is None or mask.shape != x.shape[:-1]:
            return torch.ones_like(x[..., :1], dtype=torch.float32)
        return mask.to(x.device, torch.float32)[..., None]

    def _see(
        self, path: str, layer: BaseLayer, module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        if not module.training or _repeated():
            return
        x = args[0].detach()
        valid = self._tokens(path, x)
        kept = x.float() * valid
        _add(layer.inputs, "absolute", kept.abs())
        _add(layer.inputs, "square", kept.square())
        _add(layer.inputs, "count", valid)

    def _ask(
        self, path: str, layer: BaseLayer, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if not module.training or not torch.is_grad_enabled():
            return None
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        if not _repeated():
            valid = self._tokens(path, x)
            x.register_hook(lambda g: _add(layer.inputs, "gradient", g.float().abs() * valid))
        return (x, *args[1:])


def _repeated() -> bool:
    """Whether this forward pass is gradient checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    total = values.flatten(0, -2).sum(0)
    sums[name] = sums[name] + total if name in sums else total
