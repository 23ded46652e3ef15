"""A toy whose layers report their outputs, as the layers of a supernet do."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Watched(nn.Module):
    """A linear layer that reports its output as the contribution of one slot."""

    def __init__(self, slot_id: str, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.slot_id = slot_id
        self.observer = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.observer is not None:
            self.observer(SimpleNamespace(slot_id=self.slot_id), y, x)
        return y


class Toy(nn.Module):
    """Three linears; the first two are tied into one unit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Watched("tied", 3, 4), Watched("tied", 4, 5)
        self.third = Watched("single", 5, 2)

    def forward(self, x: Tensor, *, repeat: str = "") -> Tensor:
        x = torch.tanh(self.first(x))
        if repeat:
            x = checkpoint(self.second, x, use_reentrant=repeat == "reentrant")
        else:
            x = self.second(x)
        return self.third(torch.tanh(x))

    @property
    def layers(self) -> tuple[Watched, ...]:
        return (self.first, self.second, self.third)

    @property
    def units(self) -> dict[str, tuple[nn.Parameter, ...]]:
        tied = (*self.first.parameters(), *self.second.parameters())
        return {"tied": tied, "single": tuple(self.third.parameters())}
