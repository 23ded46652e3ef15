"""Gates of one module of a supernet: is it there, and how many of its first ranks."""

import torch
from torch import Tensor, nn

from prunepeft.kinds import Kind
from prunepeft.space import Site
from prunepeft.supernet.attach import ADAPTER
from prunepeft.supernet.layer import UnionLayer

_LEAST = 1e-12  # gates of attention weights enter as logarithms


def has_rank_gates(kind: Kind, site: Site) -> bool:
    """Whether ranks of a module here can be gated one by one."""
    return bool(kind.rank_gates) or "attention" in kind.stages(site)


class ModuleGates(nn.Module):
    """The gates of one slot, the same at all its tied sites.

    `presence` () multiplies what the module adds. `ranks` (size,) multiplies one factor of each of
    its products, so that a gate has one gradient, also where it is zero. In an attention there is
    one gate for each token, the product of both.

    Args:
        layers: (layer, kind) pairs of the slot.
        ranked: Whether its ranks are gated.
    """

    def __init__(self, layers: list[tuple[UnionLayer, str]], *, ranked: bool) -> None:
        super().__init__()
        self._branches = [layer.branches[ADAPTER][kind] for layer, kind in layers]
        device = next(iter(layers[0][0].params(ADAPTER, layers[0][1]).values())).device
        size = self._branches[0].size
        self._joint = "attention" in self._branches[0].stages
        self.presence = nn.Parameter(torch.ones((size,) if self._joint else (), device=device))
        self._mask = torch.ones(size)  # on the CPU, of the last `set`
        self._there = 1.0
        if ranked and not self._joint:
            self.ranks = nn.Parameter(torch.ones(size, device=device))
        else:
            self.ranks = None
        for branch in self._branches:
            branch.gate, branch.ranks = self.presence, self.ranks

    @torch.no_grad()
    def set(self, there: float, n_ranks: int) -> None:
        """Show the module or not, with its first ranks."""
        self._there = there
        self._mask = (torch.arange(len(self._mask)) < n_ranks).float()
        if self._joint:
            self.presence.copy_((there * self._mask).clamp(min=_LEAST))
        else:
            self.presence.fill_(there)
        if self.ranks is not None:
            self.ranks.copy_(self._mask)

    def take_gradients(self) -> list[Tensor]:
        """Gradients of the gates, where they are, taken off so that no optimiser uses them."""
        gates = [self.presence] if self.ranks is None else [self.presence, self.ranks]
        found = [torch.zeros_like(g) if g.grad is None else g.grad.detach() for g in gates]
        for gate in gates:
            gate.grad = None
        return found

    def slopes(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives by presence, (), and by the ranks, (size,), from these gradients."""
        if self._joint:
            return (gradients[0] * self._mask).sum(), gradients[0] * self._there
        ranks = gradients[1] if len(gradients) > 1 else torch.zeros_like(self._mask)
        return gradients[0], ranks

    def leave(self) -> None:
        """The module as it was before."""
        for branch in self._branches:
            branch.gate, branch.ranks = 1.0, None
