"""Scores of heads and neurons: what a criterion says of features, pooled to the units of groups.

The features that a unit owns are summed, every layer's sums are made one unit vector, and the
vectors of a group are added, so that every layer has an equal say.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunepeft.errors import ConfigError
from prunepeft.families import guess_role
from prunepeft.quantized import is_quantized
from prunepeft.sites import linear_dims
from prunepeft.structured.activity import Activity
from prunepeft.structured.base_criteria import BASE_CRITERIA, BaseCriterion
from prunepeft.structured.base_layers import BaseLayer, add_over_processes
from prunepeft.structured.groups import Group, Part
from prunepeft.supernet.attach import ADAPTER
from prunepeft.supernet.layer import UnionLayer


class Scorer:
    """Scores of the units of groups, step by step, by one criterion.

    Args:
        base: The base model inside a peft model, with its modules on.
        groups: What to judge.
        criterion: How.
        net: The model that is called with the batch; default: `base`.
        adapter: Whose modules.
    Raises:
        ConfigError: if the criterion has nothing to say about a group, or cannot read a layer.
    Example:
        with masks on and the optimizer made: `start()`; after every backward `scores()` and
        `clear()`; at the end `stop()`.
    """

    def __init__(
        self,
        base: nn.Module,
        groups: Sequence[Group],
        criterion: BaseCriterion,
        *,
        net: nn.Module | None = None,
        adapter: str = ADAPTER,
    ) -> None:
        self.groups = tuple(groups)
        self.criterion = criterion
        self._modules = {p.path: base.get_submodule(p.path) for g in groups for p in g.parts}
        self._layers = {
            path: BaseLayer(path, module, adapter)
            for path, module in self._modules.items()
            if linear_dims(_plain(module)) is not None
        }
        self._parts = {g.id: self._covered(g) for g in self.groups}
        self._net = base if net is None else net
        self._activity = self._watch()
        self._asked: list[nn.Parameter] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def start(self) -> None:
        """Begin to look: hooks, and gradients of frozen weights if the criterion needs them."""
        if "weight_gradients" in self.criterion.needs:
            weights = (layer.weight for pairs in self._parts.values() for _, layer in pairs)
            self._asked = [w for w in dict.fromkeys(weights) if not w.requires_grad]
            self._handle = self._net.register_forward_pre_hook(self._ask)
        if self._activity is not None:
            self._activity.start()

    def stop(self) -> None:
        """Take everything off; the base model is as it was."""
        self.clear()
        if self._handle is not None:
            self._handle.remove()
        if self._activity is not None:
            self._activity.stop()

    def clear(self) -> None:
        """Forget the step, so that the next begins at zero and no other code sees its gradients."""
        for weight in self._asked:
            weight.grad = None
            weight.requires_grad_(False)
        if self._activity is not None:
            self._activity.clear()

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Worth of every unit in this step, (n_units,) by group id; higher = more worth keeping."""
        add_over_processes(weight.grad for weight in self._asked if weight.grad is not None)
        if self._activity is not None:
            self._activity.pool()
        found = {}
        for group in self.groups:
            sums = [
                vector
                for part, layer in self._parts[group.id]
                for vector in unit_sums(
                    self.criterion.features(layer, part.side), part, group.n_units
                )
            ]
            device = sums[0].device
            found[group.id] = torch.stack([unit_vector(v).to(device) for v in sums]).sum(0)
        return found

    def _covered(self, group: Group) -> list[tuple[Part, BaseLayer]]:
        pairs = [(p, self._layers[p.path]) for p in group.parts if p.path in self._layers]
        kept = [(p, layer) for p, layer in pairs if self.criterion.covers(layer, p.side)]
        if not kept:
            others = ", ".join(
                name for name in BASE_CRITERIA.names() if name != self.criterion.name
            )
            raise ConfigError(
                f"criterion {self.criterion.name!r} cannot judge {group.id}: none of its layers "
                f"carries LoRA. Put LoRA on one of {', '.join(p.path for p, _ in pairs)}, or use "
                f"another criterion ({others})."
            )
        if "weight_gradients" in self.criterion.needs:
            bad = [la.path for _, la in kept if is_quantized(la.union.get_base_layer())]
            if bad:
                raise ConfigError(
                    f"criterion {self.criterion.name!r} needs the gradient of the base weights, "
                    f"and {bad[0]} is quantised. Use criterion 'lora', or load the base model in "
                    "bf16."
                )
        return kept

    def _ask(self, module: nn.Module, args: object) -> None:
        """Gradients of frozen weights are asked for from here to the end of the step alone."""
        for weight in self._asked if module.training else ():
            weight.requires_grad_(True)

    def _watch(self) -> Activity | None:
        if not self.criterion.needs & {"inputs", "writer_gradients"}:
            return None
        sources = {p.path: _source(g, p) for g in self.groups for p, _ in self._parts[g.id]}
        layers = {path: (self._layers[path], self._modules[path]) for path in sources}
        return Activity(self._net, layers, sources, "writer_gradients" in self.criterion.needs)


def unit_sums(values: Tensor, part: Part, n_units: int) -> list[Tensor]:
    """Sum feature values over what each unit owns: (n_units,) for every segment of the part.

    A fused layer counts as the layers it is made of.
    """
    return [
        values[start : start + size * n_units].reshape(n_units, size).sum(1)
        for start, size in part.segments
    ]


def unit_vector(values: Tensor) -> Tensor:
    """Divide by the Euclidean norm; zeros stay zeros.

    Differs from released code: that adds 1e-8 to the norm, which squares of small gradients do
    not exceed.

    Example:
        >>> unit_vector(torch.tensor([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    largest = values.abs().amax()
    safe = values / torch.where(largest == 0, torch.ones_like(largest), largest)
    norm = torch.linalg.vector_norm(safe)
    return safe / torch.where(norm == 0, torch.ones_like(norm), norm)


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, UnionLayer) else module


def _source(group: Group, part: Part) -> str:
    """Whose tokens enter this layer."""
    from_encoder = group.block == "cross_attention" and guess_role(part.path)[1] in ("k", "v")
    return "encoder" if from_encoder else group.stack
