"""The union: one peft tuner that holds every kind at once. Its config IS the placement."""

import enum
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from prunepeft.errors import CheckpointError, ConfigError, SiteError
from prunepeft.kinds import slot_kind
from prunepeft.quantized import is_quantized, is_readable, stay_trainable
from prunepeft.sites import layer_dims, norm_width
from prunepeft.space import Placement, Site, Slot
from prunepeft.supernet.attention import carry, check_attention, release
from prunepeft.supernet.base_digest import base_digest, check_base, is_digest
from prunepeft.supernet.input_tap import InputTap
from prunepeft.supernet.layer import NO_MERGE, PREFIX, Branch, UnionLayer


class UnionPeftType(enum.StrEnum):
    """peft's type list is a closed enum; a second string enum is looked up the same way."""

    PRUNEPEFT = "PRUNEPEFT"


@dataclass
class UnionConfig(PeftConfig):
    """peft config of the union.

    Attributes:
        placement: `Placement.to_dict()`; kept in step when modules are removed or shrunk.
        init_seed: Seed of the modules' first values.
        modules_to_save: Modules trained in full and saved beside (the task head).
        target_modules: Informative: the paths that carry modules.
        base_digest: Content digest of the pruned base model; None on an unpruned one.
    """

    placement: dict[str, Any] | None = None
    init_seed: int = 0
    modules_to_save: list[str] | None = None
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    bias: str = field(default="none")
    base_digest: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._was_saved = False
        if self.base_digest is not None and not is_digest(self.base_digest):
            raise CheckpointError(
                f"base_digest in the adapter's config is {self.base_digest!r:.80}, not a SHA-256 "
                "in hex; the file is damaged. Restore it from a copy."
            )
        self.peft_type = UnionPeftType.PRUNEPEFT
        if isinstance(self.placement, Placement):
            self.placement = self.placement.to_dict()
        if self.bias != "none":
            raise ConfigError(f"UnionConfig.bias must be 'none'; got {self.bias!r}.")
        self.set_placement(Placement.from_dict(self.placement) if self.placement else Placement())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "UnionConfig":
        """Read a saved config; one without `base_digest` belongs to an unpruned base."""
        config = super().from_pretrained(*args, **kwargs)
        config._was_saved = True
        return config

    def set_placement(self, placement: Placement) -> None:
        """Replace the placement and everything derived from it."""
        self._placement = placement
        self.placement = placement.to_dict()
        self.by_path: dict[str, list[tuple[Slot, Site, int]]] = {}
        for slot, size in placement.sizes.items():
            for site in slot.sites:
                self.by_path.setdefault(site.path, []).append((slot, site, size))
        self.target_modules = sorted(self.by_path)

    def get_placement(self) -> Placement:
        return self._placement

    def to_dict(self) -> dict[str, Any]:
        """JSON form; head names are listed once, however often peft has appended them."""
        data = super().to_dict()
        if self.base_digest is None:
            del data["base_digest"]
        if self.modules_to_save is not None:
            data["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        return data


class UnionModel(BaseTuner):
    """The model with its modules injected; see `UnionLayer`."""

    prefix: str = PREFIX
    tuner_layer_cls = UnionLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (a class attribute of peft)

    def _prepare_adapter_config(self, peft_config: UnionConfig, model_config: dict) -> UnionConfig:
        if not peft_config.by_path:
            raise ConfigError("the placement is empty; nothing would be trained. Keep one module.")
        return peft_config

    def _prepare_model(self, peft_config: UnionConfig, model: nn.Module) -> None:
        if peft_config.base_digest is None and not peft_config._was_saved:
            peft_config.base_digest = base_digest(model)
        check_base(peft_config.base_digest, model)
        stay_trainable(model)
        modules = dict(model.named_modules())
        for path, entries in peft_config.by_path.items():
            site = entries[0][1]
            needed = [path] + [s.source for sl, s, _ in entries if slot_kind(sl).needs_source]
            for name in needed:
                if name not in modules:
                    raise SiteError(
                        f"the placement names {name!r}, which this model lacks; it was made for "
                        "another architecture. Load the base model it was searched on."
                    )
            base = (
                modules[path].get_base_layer()
                if hasattr(modules[path], "base_layer")
                else modules[path]
            )
            _check_dims(path, site, base)
            _check_kinds(path, entries, base)
            if any("attention" in slot_kind(slot).stages(s) for slot, s, _ in entries):
                parent = path.rpartition(".")[0]
                check_attention(modules[parent], parent, is_fused=site.role == "fused_qkv")

    @staticmethod
    def _check_target_module_exists(peft_config: UnionConfig, key: str) -> bool:
        return key in peft_config.by_path

    def _create_and_replace(
        self,
        peft_config: UnionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_new = not isinstance(target, UnionLayer)
        layer = UnionLayer(target) if is_new else target
        for slot, site, size in peft_config.by_path[current_key]:
            kind = slot_kind(slot)
            branch = Branch(slot.id, kind, site, size, kind.scaling(slot.sizes[-1]))
            layer.add(adapter_name, branch, peft_config.init_seed)
            if kind.needs_source and layer.tap is None:
                layer.tap = _tap(self.model, site.source)
            if "attention" in branch.stages:
                carry(parent)
        if adapter_name not in self.active_adapters:
            for branch in layer.branches[adapter_name].values():
                for parameter in layer.params(adapter_name, branch.kind.name).values():
                    parameter.requires_grad_(False)
        if is_new:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in its place; nothing is moved, the layers share their tensors."""
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        release(self.model)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers = [layer for layer in self.model.modules() if isinstance(layer, UnionLayer)]
        if any(is_quantized(layer.get_base_layer()) for layer in layers):
            raise ConfigError(NO_MERGE)
        kinds = {
            branch.kind
            for layer in layers
            for name in layer.active_adapters
            for branch in layer.branches.get(name, {}).values()
        }
        bad = sorted({k.name for k in kinds if not k.mergeable})
        if bad:
            raise ConfigError(
                f"the adapter holds {', '.join(bad)}, which cannot be merged into a layer; "
                "keep the adapter as it is, or search with mergeable kinds only (`prunepeft ls "
                "kinds` shows them)."
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, InputTap):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        release(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: UnionConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = {
            k: v.shape
            for k, v in model.state_dict().items()
            if f".{PREFIX}" in k and k.endswith(f".{adapter_name}")
        }
        loaded = {k: v.shape for k, v in remapped.items() if f".{PREFIX}" in k}
        missing = sorted(own.keys() - loaded.keys())
        extra = sorted(loaded.keys() - own.keys())
        wrong = sorted(k for k in own.keys() & loaded.keys() if own[k] != loaded[k])
        if missing or extra or wrong:
            raise CheckpointError(
                f"the adapter's tensors do not fit its placement: {len(missing)} missing "
                f"{missing[:2]}, {len(extra)} unexpected {extra[:2]}, {len(wrong)} of another "
                f"shape {wrong[:2]}. The folder is damaged or was edited by hand; export it again."
            )
        return remapped


def register() -> None:
    """Make the union known to peft. Safe to call again."""
    own = UnionPeftType.PRUNEPEFT
    peft.PEFT_TYPE_TO_CONFIG_MAPPING[own] = UnionConfig
    peft.PEFT_TYPE_TO_TUNER_MAPPING[own] = UnionModel
    PEFT_TYPE_TO_PREFIX_MAPPING[own] = PREFIX


def _tap(model: nn.Module, source: str) -> InputTap:
    """Hook that hands on the input of the linear layer at `source`."""
    module = model.get_submodule(source)
    base = module.get_base_layer() if isinstance(module, UnionLayer) else module
    tap = InputTap()
    tap.handle = base.register_forward_pre_hook(tap, with_kwargs=True)
    return tap


def _check_kinds(path: str, entries: list[tuple[Slot, Site, int]], base: nn.Module) -> None:
    for kind, site in ((slot_kind(slot), site) for slot, site, _ in entries):
        if not kind.fits(site):
            raise SiteError(f"{kind.name!r} needs {kind.home}; {path!r} is no such site.")
        if kind.reads_weight and not is_readable(base):
            raise SiteError(
                f"{kind.name!r} needs the frozen weight as plain numbers; {path!r} is a "
                f"{type(base).__name__} whose codes cannot be read back. Use other kinds, or a "
                "base model in full precision, 8bit or 4bit."
            )


def _check_dims(path: str, site: Site, base: nn.Module) -> None:
    dims = layer_dims(base)
    if dims is None or getattr(base, "weight", None) is None:
        raise SiteError(
            f"{path!r} is a {type(base).__name__}; only linear and normalisation layers carry "
            "modules."
        )
    if dims != (site.d_in, site.d_out):
        raise SiteError(
            f"{path!r} maps {dims[0]} to {dims[1]} features in this model, but the placement was "
            f"made for {site.d_in} to {site.d_out}. Load the base model it was searched on."
        )
    same_type = (norm_width(base) is not None) == (site.role == "norm")
    if not same_type or (site.has_bias and getattr(base, "bias", None) is None):
        raise SiteError(
            f"{path!r} is a {type(base).__name__} here, but the placement was made for role "
            f"{site.role!r}, bias: {site.has_bias}. Load the base model it was searched on."
        )


register()
