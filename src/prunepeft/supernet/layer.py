"""One wrapper per layer: the frozen linear or normalisation layer plus every module on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunepeft.errors import ConfigError, StateError
from prunepeft.kinds.base import STAGES, Kind, seeded
from prunepeft.processes import whole
from prunepeft.quantized import dense_weight, is_quantized
from prunepeft.sites import norm_width
from prunepeft.space import Site
from prunepeft.supernet.input_tap import InputTap, taps_on
from prunepeft.supernet.norm_scale import scale_offset

PREFIX = "union_"
NO_MERGE = (
    "the base model is quantised; merging would round every weight again and change the model. "
    "Keep the adapter apart, or put it on the full precision model that the base was made from and "
    "merge it there (export with base= that model)."
)


@dataclass
class Branch:
    """One module on one layer.

    Attributes:
        slot_id: The slot it belongs to; tied sites share it.
        kind: The kind with its options.
        site: Where it sits.
        size: Current size.
        scaling: Factor of the update, fixed at the slot's largest size.
        gate: Multiplier of its contribution; 0 hides the module. As a tensor, (), gradients reach
            it; at stage "attention" it may be one multiplier per unit, (size,), and is over 0.
        ranks: Multipliers of its ranks, (size,), for kinds with `rank_gates`; None: all are 1.
        origin: Tensors like the module's whose contribution is taken off again, so that a module
            with these very values changes nothing. For the time of a training.
        stages: Where in the layer it acts, in order.
        tensors: Names of its tensors.
    """

    slot_id: str
    kind: Kind
    site: Site
    size: int
    scaling: float
    gate: float | Tensor = 1.0
    ranks: Tensor | None = None
    origin: Mapping[str, Tensor] | None = None
    stages: tuple[str, ...] = field(init=False)
    tensors: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = self.kind.stages(self.site)
        self.tensors = tuple(self.kind.shapes(self.site, self.size))

    @property
    def is_gated(self) -> bool:
        """Whether the gate may change anything; a tensor is not read, which would wait for it."""
        return isinstance(self.gate, Tensor) or self.gate != 1.0 or self.ranks is not None


class UnionLayer(nn.Module, BaseTunerLayer):
    """A frozen linear or normalisation layer and its modules, in the order of `STAGES`.

    Those of stage "attention" act in the attention around the layer, see `supernet.attention`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names: tuple[str, ...] = ()
        self.branches: dict[str, dict[str, Branch]] = {}
        self.merged_adapters: list[str] = []
        self.tap: InputTap | None = None
        self.observer: Callable[[Branch, Tensor, Tensor], None] | None = None
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._row_norm: tuple[tuple[object, ...], Tensor] | None = None
        self.is_transposed = isinstance(base_layer, Conv1D)
        self.is_norm = norm_width(base_layer) is not None

    # --- structure -------------------------------------------------------------------------

    def add(self, adapter: str, branch: Branch, seed: int) -> None:
        """Put a module here with fresh values that depend on seed, slot and site alone."""
        kind = branch.kind
        self.branches.setdefault(adapter, {})[kind.name] = branch
        shapes = kind.shapes(branch.site, branch.size)
        values = kind.init(shapes, self, seeded(seed, branch.slot_id, branch.site.path))
        self.set_params(adapter, kind.name, values)

    def drop(self, adapter: str, kind: str) -> None:
        """Take a module away with its tensors."""
        branch = self.branches[adapter].pop(kind)
        if not self.branches[adapter]:
            del self.branches[adapter]
        for name in (_attribute(kind, tensor) for tensor in branch.tensors):
            container = getattr(self, name)
            del container[adapter]
            if not len(container):
                delattr(self, name)
                self.adapter_layer_names = tuple(n for n in self.adapter_layer_names if n != name)

    def params(self, adapter: str, kind: str) -> dict[str, nn.Parameter]:
        """Tensors of a module by the names its kind uses."""
        tensors = self.branches[adapter][kind].tensors
        return {t: getattr(self, _attribute(kind, t))[adapter] for t in tensors}

    def set_params(self, adapter: str, kind: str, values: dict[str, Tensor]) -> None:
        """Replace a module's tensors by new parameters of these values."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        # Half precision would round DoRA's magnitude away from the row norms it must equal.
        floating = dtype if dtype == torch.float64 else torch.float32
        for tensor, value in values.items():
            name = _attribute(kind, tensor)
            if name not in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
                self.adapter_layer_names = (*self.adapter_layer_names, name)
            container = getattr(self, name)
            old = container[adapter] if adapter in container else None
            target = floating if old is None else old.dtype
            parameter = nn.Parameter(value.detach().to(device=device, dtype=target).clone())
            parameter.requires_grad_(old is None or old.requires_grad)
            container[adapter] = parameter

    def active_branches(self) -> list[tuple[str, Branch]]:
        """(adapter, module) of all that act now; none while disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [(a, b) for a in self.active_adapters for b in self.branches.get(a, {}).values()]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.branches.pop(adapter_name, None)

    # --- what kinds may ask (Host) ---------------------------------------------------------

    def frozen_weight(self) -> Tensor:
        weight = whole(dense_weight(self.get_base_layer()))
        return weight.T if self.is_transposed else weight

    def frozen_row_norm(self) -> Tensor:
        weight = self.get_base_layer().weight
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if self._row_norm is None or self._row_norm[0] != state:
            frozen = self.frozen_weight().detach()
            wide = torch.promote_types(frozen.dtype, torch.float32)
            self._row_norm = (state, torch.linalg.norm(frozen.to(wide), dim=1))
        return self._row_norm[1]

    def frozen_linear(self, x: Tensor) -> Tensor:
        if self._seen is not None and (self._seen[0] is x or self.is_norm):
            bias = getattr(self.get_base_layer(), "bias", None)
            return self._seen[1] if bias is None else self._seen[1] - bias
        return F.linear(x, self.frozen_weight().to(x.dtype))

    def sublayer_input(self) -> Tensor:
        if self.tap is None:
            raise StateError("this layer has no parallel adapter wired to its sub-layer's input.")
        return self.tap.read()

    # --- forward ---------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self._forward(x, *args, **kwargs)
        if self.tap is not None:
            self.tap.value = None
        return y

    def _forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self.active_branches()
        at = {stage: [a for a in active if stage in a[1].stages] for stage in STAGES}
        shifted = x
        for name, branch in at["input"]:
            shifted = shifted + self._contribution(name, branch, "input", shifted, shifted)
        y = self.base_layer(shifted, *args, **kwargs)
        for tap in taps_on(self.base_layer):
            tap.value = x
        self._seen = (x, y) if shifted is x else None
        total = self._changed_product(at["product"], x, y)
        before = total
        for name, branch in at["add"]:
            total = total + self._contribution(name, branch, "add", x, before)
        self._seen = None
        for stage in ("scale", "output"):
            for name, branch in at[stage]:
                total = total + self._contribution(name, branch, stage, x, total)
        return total

    def _changed_product(self, active: list[tuple[str, Branch]], x: Tensor, y: Tensor) -> Tensor:
        """The layer's output after the modules that change W x and leave the bias alone."""
        if not active:
            return y
        bias = getattr(self.get_base_layer(), "bias", None)
        product = y if bias is None else y - bias
        for name, branch in active:
            change = self._contribution(name, branch, "product", x, product)
            product, y = product + change, y + change
        return y

    def _contribution(
        self, adapter: str, branch: Branch, stage: str, x: Tensor, y: Tensor
    ) -> Tensor:
        params = self.params(adapter, branch.kind.name)
        if branch.ranks is not None:
            params = branch.kind.gated(params, branch.ranks)
        dtype = next(iter(params.values())).dtype
        out_dtype = y.dtype
        if dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            x, y = x.to(dtype), y.to(dtype)
        delta = branch.kind.delta(params, x, y, branch.scaling, self, stage)
        if branch.origin is not None:
            delta = delta - branch.kind.delta(branch.origin, x, y, branch.scaling, self, stage)
        if branch.is_gated:
            delta = delta * branch.gate
        if self.observer is not None and stage == branch.stages[-1]:
            self.observer(branch, delta, y)
        return delta.to(out_dtype)

    # --- merge -----------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the modules into the frozen weight; the old weight is kept for an exact unmerge."""
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.branches]
        if not adapters:
            return
        base = self.get_base_layer()
        if is_quantized(base):
            raise ConfigError(NO_MERGE)
        original = (base.weight.detach().clone(), _bias_of(base))
        branches = [(a, b) for a in adapters for b in self.branches[a].values()]
        weight, bias = self.merged_with(branches)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaN or infinite values in the merged weight of adapters {adapters}.")
        if self._kept is None:
            self._kept = original
        base.weight.data = (weight.T if self.is_transposed else weight).contiguous().to(base.weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        if self._kept is None:
            return
        base = self.get_base_layer()
        base.weight.data, bias = self._kept
        if bias is not None:
            base.bias.data = bias
        self._kept = None
        self.merged_adapters.clear()

    def merged_with(self, active: list[tuple[str, Branch]]) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in) and bias of the frozen layer with these modules in it."""
        wide = torch.float64 if self.frozen_weight().dtype == torch.float64 else torch.float32
        frozen = self.frozen_weight().to(wide)
        offset = scale_offset(self.get_base_layer()) if self.is_norm else 0.0
        if offset:
            frozen = frozen + offset
        base_bias = _bias_of(self.get_base_layer())
        weight, bias = frozen, None if base_bias is None else base_bias.to(wide)
        for stage in STAGES:
            acting = [a for a in active if stage in a[1].stages]
            for name, branch in reversed(acting) if stage == "input" else acting:
                own = self.params(name, branch.kind.name)
                params = {k: v.detach().to(wide) for k, v in own.items()}
                start = frozen if stage == "add" else weight
                new, new_bias = branch.kind.merged(start, bias, params, branch.scaling, stage)
                if branch.is_gated:
                    raise StateError("a gated module cannot be merged; set its gate back to 1.")
                weight = weight + (new - start) if stage == "add" else new
                bias = new_bias
        return weight - offset if offset else weight, bias


def _attribute(kind: str, tensor: str) -> str:
    return f"{PREFIX}{kind}_{tensor}"


def _bias_of(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.detach().clone()
