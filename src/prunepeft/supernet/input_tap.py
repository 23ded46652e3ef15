"""What a sub-layer reads, handed to the layer that writes its output (parallel adapters)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prunepeft.errors import StateError


class InputTap:
    """Carries a sub-layer's input from the linear that reads it to the one that writes its output.

    It is a forward pre-hook on the reading layer, whose modules are not in between. The writing
    layer empties it at the end of its forward pass, so no activation outlives the pass; it is never
    copied or pickled with the model.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        self.value = args[0] if args else next(iter(kwargs.values()))

    def read(self) -> Tensor:
        if self.value is None:
            raise StateError(
                "a parallel adapter ran before its sub-layer's input was read; the model calls its "
                "layers in an unusual order, so use kinds without a source (serial_adapter, lora)."
            )
        return self.value

    def __deepcopy__(self, memo: dict[int, object]) -> "InputTap":
        memo[id(self)] = copy = InputTap()
        return copy

    def __reduce__(self) -> tuple[type["InputTap"], tuple[()]]:
        return InputTap, ()


def taps_on(module: nn.Module) -> Iterator[InputTap]:
    """The taps that read a layer's input."""
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, InputTap))
