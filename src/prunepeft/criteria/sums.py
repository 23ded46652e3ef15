"""Running sums over the steps of a training pass, on the device."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunepeft.errors import StateError
from prunepeft.kinds import off_neutral


class GradientSums:
    """Running sums over the steps of parameters that share a device.

    `signed` holds the sum of g per parameter in its shape; `absolute` the sums over steps and
    elements of |g| and |w * g|, (2, number of parameters), float32, with w from its neutral value.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], neutral: Mapping[int, Tensor | float]
    ) -> None:
        self.parameters = tuple(parameters)
        self.neutral = [neutral.get(id(p), 0.0) for p in self.parameters]
        self.signed = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        self.absolute = torch.zeros(2, len(self.parameters), device=self.parameters[0].device)

    @torch.no_grad()
    def add(self) -> None:
        live = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not live:
            return
        grads = [self.parameters[i].grad.float() for i in live]  # pyright: ignore
        weights = [off_neutral(self.parameters[i].float(), self.neutral[i]) for i in live]
        torch._foreach_add_([self.signed[i] for i in live], grads)
        for row, tensors in enumerate((grads, torch._foreach_mul(grads, weights))):
            sums = [self.absolute.new_zeros(())] * len(self.parameters)
            for i, tensor in zip(live, torch._foreach_abs(tensors), strict=True):
                sums[i] = tensor.sum()
            self.absolute[row] += torch.stack(sums)


class OutputSums:
    """Running sum of |output| in float32 and number of elements per unit."""

    def __init__(self, units: Collection[str]) -> None:
        self.index = {unit: i for i, unit in enumerate(units)}
        self.sums = torch.zeros(len(units))
        self.counts = [0] * len(units)

    def add(self, unit: str, delta: Tensor) -> None:
        if (i := self.index.get(unit)) is None:
            return
        if not any(self.counts):
            self.sums = self.sums.to(delta.device)
        self.sums[i] += delta.detach().abs().sum(dtype=torch.float32).to(self.sums.device)
        self.counts[i] += delta.numel()

    def read(self) -> Tensor:
        """Mean of |output| per unit, (N,); 0 for a unit that never ran."""
        counts = summed(torch.tensor(self.counts, device=self.sums.device)).cpu()
        if self.counts and not counts.any():
            raise StateError(
                "no output was seen in any optimiser step; put the model in training mode and "
                "enter the recorder before the first forward pass."
            )
        return summed(self.sums).cpu().double() / counts.clamp(min=1)


def by_device(units: Mapping[str, Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    groups: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(p for unit in units.values() for p in unit):
        groups.setdefault(parameter.device, []).append(parameter)
    return list(groups.values())


def n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Sum over all processes, as a new tensor where there are several."""
    if n_processes() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total
