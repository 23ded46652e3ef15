"""Multipliers of heads and neurons: to learn what matters, and to hide what will be cut."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prunepeft.structured.cut import Cut, check_cut
from prunepeft.structured.groups import Group
from prunepeft.supernet import base_of


class Masks(nn.Module):
    """One multiplier per unit of every group, ones at first.

    They act on the input of the layers that write a sub-layer's output (attention output, down
    projection), so they scale what a head or a neuron gives, in every family alike; at 0 the unit
    is as good as cut. For heads that equals a multiplier of the attention weights after the
    softmax.

    The hooks lie on the modules at these paths now. Put modules on the model before the masks, and
    take the masks off before the model is cut or its modules are removed.

    Args:
        model: A plain model, or a peft model with modules on it.
        groups: `find_groups` of the plain model.
        trainable: Whether gradients reach the multipliers.
    References:
        Light-PEFT, 2024, arXiv 2406.03792, section 3 (trainable masks of heads and neurons).
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], *, trainable: bool = False
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.values = nn.ParameterDict()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        base = base_of(model)
        for group in self.groups:
            writers = [(p, base.get_submodule(p.path)) for p in group.parts if p.side == "in"]
            device = next(writers[0][1].parameters()).device
            value = nn.Parameter(torch.ones(group.n_units, device=device), requires_grad=trainable)
            self.values[_key(group.id)] = value
            for part, module in writers:
                ((_, size),) = part.segments
                self._handles.append(module.register_forward_pre_hook(_Scale(value, size)))

    def __getitem__(self, group_id: str) -> nn.Parameter:
        """The multipliers of a group, (n_units,) in float32."""
        return self.values[_key(group_id)]

    def __iter__(self) -> Iterator[str]:
        return (group.id for group in self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def show(self, cut: Cut) -> None:
        """Set multipliers to 1 for units the cut keeps and to 0 for the others."""
        check_cut(self.groups, cut)
        with torch.no_grad():
            for group in self.groups:
                kept = list(cut.keep.get(group.id, range(group.n_units)))
                self[group.id].zero_()[kept] = 1.0

    def remove(self) -> None:
        """Take the hooks off; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Scale:
    """Forward pre-hook that multiplies every unit's features; copied with the model and masks."""

    def __init__(self, value: nn.Parameter, size: int) -> None:
        self.value = value
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        scale = self.value[:, None].expand(-1, self.size).flatten()
        return (x * scale.to(x), *args[1:])


def is_masked(module: nn.Module) -> bool:
    """Whether multipliers act on a layer."""
    return any(isinstance(hook, _Scale) for hook in module._forward_pre_hooks.values())


def _key(group_id: str) -> str:
    return group_id.replace(".", "/")  # parameters may not have dots in their names
