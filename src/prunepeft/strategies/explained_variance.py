"""A probe that finds the directions in which the inputs of layers vary."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from prunepeft.errors import StateError
from prunepeft.probes import Passes
from prunepeft.space import Slot
from prunepeft.tasks.base import IGNORED


class ExplainedVariance:
    """A `Probe`: shares of the variance of each layer's input that its main directions explain.

    Found: slot id -> shares, (k,), falling, mean over tied layers; k is `n_directions`, or fewer
    where a layer is narrower. Padding does not count, nor do tokens without a label where tokens
    have labels. Layers that read the same tensor share one decomposition.

    Args:
        slots: Where modules may go.
        n_directions: How many directions of each layer.
        tau: A layer is done when every direction has at least this cosine with itself before.
    References:
        EVA, NeurIPS 2025, arXiv 2410.07170, algorithm 1.
    """

    def __init__(self, slots: Sequence[Slot], *, n_directions: int, tau: float) -> None:
        self.slots = tuple(slots)
        self.config: dict[str, Any] = {
            "probe": "explained-variance",
            "slots": {s.id: [site.path for site in s.sites] for s in slots},
            "n_directions": n_directions,
            "tau": tau,
        }
        widths = {site.path: site.d_in for s in slots for site in s.sites}
        self._inputs = {p: _Input(p, min(n_directions, d), tau) for p, d in widths.items()}

    def measure(self, passes: Passes) -> dict[str, Tensor]:
        """See `Probe.measure`."""
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, str] | None = None
        self._source: dict[str, str] = {}
        hooks = [
            passes.model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: self._see(path, args[0])
            )
            for path in self._inputs
        ]
        try:
            passes.look(passes.model, self._begin)
        finally:
            for hook in hooks:
                hook.remove()
            self._last = None
        return {s.id: self._shares([site.path for site in s.sites]) for s in self.slots}

    def _begin(self, batch: Mapping[str, Tensor]) -> bool:
        """A batch comes; False if all layers are done."""
        self._mask, self._last = token_mask(batch), None
        own = [self._inputs[path] for path in set(self._source.values())]
        return not own or not all(each.done for each in own)

    def _see(self, path: str, x: Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            self._source.setdefault(path, self._last[1])
            return
        self._last = (x, path)
        if self._source.setdefault(path, path) == path:
            self._inputs[path].add(counted(x, self._mask))

    def _shares(self, paths: Sequence[str]) -> Tensor:
        found = [self._inputs[self._source.get(path, path)].shares() for path in paths]
        k = min(len(shares) for shares in found)
        return torch.stack([shares[:k] for shares in found]).mean(0)


class _Input:
    """Directions of what one layer reads, batch by batch."""

    def __init__(self, path: str, n: int, tau: float) -> None:
        self.path, self.n, self.tau = path, n, tau
        self.pca: IncrementalPCA | None = None
        self.done = False

    def add(self, rows: Tensor) -> None:
        """Take the rows of a batch in, (tokens, d_in); too few are passed over."""
        if self.done or len(rows) < self.n:
            return
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.detach().float()
            before = None
            if self.pca is None:
                quick = 2 * self.n <= min(rows.shape)
                self.pca = IncrementalPCA(self.n, copy=True, lowrank=quick, lowrank_seed=42)
            else:
                before = self.pca.components_.clone()
            self.pca.partial_fit(rows)
            if before is not None:
                cosines = F.cosine_similarity(self.pca.components_, before)
                self.done = bool((cosines >= self.tau).all())

    def shares(self) -> Tensor:
        """Explained share of each direction, (n,), on the CPU."""
        if self.pca is None:
            raise StateError(
                f"no batch has {self.n} tokens, which as many directions of {self.path} need; "
                "raise train.batch_size or lower allocate.max_factor."
            )
        return self.pca.explained_variance_ratio_.cpu().double().nan_to_num(0.0)


def token_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Tokens that count, (B, S): no padding, and with a label where tokens have labels."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None or mask.ndim != 2:
        return None
    mask = mask.bool()
    if labels is not None and labels.shape == mask.shape:
        return mask & labels.ne(IGNORED)
    return mask


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of an activation (B, S, d) that count, (n, d); all, if the mask is of another shape."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
