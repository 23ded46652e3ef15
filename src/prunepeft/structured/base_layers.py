"""One linear layer of the base model as a criterion sees it, summed without a full-size copy."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunepeft.sites import linear_dims
from prunepeft.supernet.attach import ADAPTER
from prunepeft.supernet.layer import Branch, UnionLayer

CHUNK = 2**22  # entries of a weight that are looked at together

Rows = Callable[[slice], Tensor]


class BaseLayer:
    """A frozen linear layer, the LoRA module on it if there is one, and what was seen of it.

    Attributes:
        path: Module path in the base model.
        shape: (d_out, d_in).
        inputs: Sums over the tokens of this step, put there by `Activity`.
    """

    def __init__(self, path: str, module: nn.Module, adapter: str = ADAPTER) -> None:
        self.path = path
        self.adapter = adapter
        # A plain layer is wrapped on the side: the wrapper knows transposed and quantised weights.
        self.union = module if isinstance(module, UnionLayer) else UnionLayer(module)
        self.inputs: dict[str, Tensor] = {}
        d_in, d_out = linear_dims(self.union.get_base_layer())
        self.shape = (d_out, d_in)

    @property
    def branch(self) -> Branch | None:
        """The LoRA module on this layer."""
        return self.union.branches.get(self.adapter, {}).get("lora")

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight, as the base layer holds it (transposed or quantised)."""
        return self.union.get_base_layer().weight

    def lora(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (r, d_in), B (d_out, r) and their gradients, zeros where there is none yet."""
        params = self.union.params(self.adapter, "lora")
        a, b = (_wide(params[name].detach()) for name in "AB")
        grads = (params[name].grad for name in "AB")
        ga, gb = (
            torch.zeros_like(p) if g is None else _wide(g)
            for p, g in zip((a, b), grads, strict=True)
        )
        return a, b, ga, gb

    def effective_weight(self, scaled: bool = True) -> Rows:
        """Rows of W + s B A (without s if not `scaled`), of W where there is no LoRA."""
        weight = self.union.frozen_weight().detach()
        branch = self.branch
        if branch is None:
            return lambda rows: _wide(weight[rows])
        a, b = self.lora()[:2]
        factor = branch.scaling * branch.gate if scaled else 1.0
        return lambda rows: _wide(weight[rows]) + factor * (b[rows] @ a)

    def weight_gradient(self) -> Rows:
        """Rows of the gradient of the frozen weight, which must have been asked for."""
        grad = self.weight.grad
        if grad is None:
            return lambda rows: torch.zeros((), device=self.weight.device)
        if self.union.is_transposed:
            grad = grad.T
        return lambda rows: _wide(grad[rows])

    def sums(self, side: str, entries: Rows) -> Tensor:
        """Sum entries over every output feature ("out", (d_out,)) or input feature ("in", (d_in,)).

        Args:
            side: "out" or "in".
            entries: Rows -> values of these rows, (n, d_in). Asked for a few rows at a time.
        """
        d_out, d_in = self.shape
        step = max(1, CHUNK // max(1, d_in))
        chunks = [slice(i, min(i + step, d_out)) for i in range(0, d_out, step)]
        if side == "out":
            return torch.cat([entries(rows).sum(1) for rows in chunks])
        total = entries(chunks[0]).sum(0)
        for rows in chunks[1:]:
            total += entries(rows).sum(0)
        return total


def add_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add the tensors of all processes, in place; nothing where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
