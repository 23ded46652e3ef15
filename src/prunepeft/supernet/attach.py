"""Put a placement on a model, change it in place, and take it off again."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from prunepeft.errors import ConfigError, StateError
from prunepeft.kinds import seeded, slot_kind
from prunepeft.space import Placement
from prunepeft.supernet.attention import release
from prunepeft.supernet.layer import UnionLayer
from prunepeft.supernet.tuner import UnionConfig

ADAPTER = "default"


def attach(
    model: nn.Module,
    placement: Placement,
    *,
    seed: int = 0,
    modules_to_save: list[str] | None = None,
    task_type: str | TaskType | None = None,
) -> PeftModel:
    """Put every module of the placement on the model and freeze the rest.

    The model is changed in place; `detach` restores it bit for bit. Each module's first values
    depend on `seed`, its slot and its site alone, not on which other modules there are.

    Args:
        model: A transformers model.
        placement: What to put where.
        seed: Seed of the first values.
        modules_to_save: Names of modules to train in full (the task head).
        task_type: peft task type, e.g. `SEQ_CLS`.
    Returns:
        The peft model; save it with `save_pretrained`, load it with `PeftModel.from_pretrained`.
    Raises:
        SiteError: if the model lacks a site of the placement.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    config = UnionConfig(
        placement=placement.to_dict(),
        init_seed=seed,
        modules_to_save=modules_to_save and list(modules_to_save),  # peft adds to the list
        task_type=task_type,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        net = get_peft_model(model, config, adapter_name=ADAPTER)
    net._prunepeft_was_trainable = trainable
    return net


def base_of(net: nn.Module) -> nn.Module:
    """The base model under the modules, if there are any."""
    return net.get_base_model() if isinstance(net, PeftModel) else net


def detach(net: PeftModel) -> nn.Module:
    """Take every module off and return the base model as it was before `attach`, head included."""
    base = net.base_model.model
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.original_module)
        elif isinstance(module, UnionLayer) and module.merged:
            module.unmerge()
    base = net.base_model.unload()
    if getattr(base, "_require_grads_hook", None) is not None:
        base.disable_input_require_grads()
    for parameter in getattr(net, "_prunepeft_was_trainable", ()):
        parameter.requires_grad_(True)
    base.zero_grad(set_to_none=True)
    return base


def placement_of(net: PeftModel, adapter: str = ADAPTER) -> Placement:
    """The placement as it stands after all removals and cuts."""
    adapters = getattr(net, "peft_config", {})  # a plain model has none
    config = adapters.get(adapter)
    if not isinstance(config, UnionConfig):
        raise StateError(
            f"adapter {adapter!r} is not a prunepeft union (found {sorted(adapters)}); make "
            "the model with prunepeft.attach or get_peft_model(model, UnionConfig(...))."
        )
    return config.get_placement()


def slot_layers(net: PeftModel, adapter: str = ADAPTER) -> dict[str, list[tuple[UnionLayer, str]]]:
    """Slot id -> its (layer, kind) pairs, in the order of the placement and its sites."""
    modules = dict(net.base_model.model.named_modules())
    return {
        slot.id: [(modules[site.path], slot.kind) for site in slot.sites]
        for slot in placement_of(net, adapter)
    }


def slot_parameters(net: PeftModel, adapter: str = ADAPTER) -> dict[str, dict[str, nn.Parameter]]:
    """Slot id -> `<path>.<tensor>` -> parameter."""
    modules = dict(net.base_model.model.named_modules())
    return {
        slot.id: {
            f"{site.path}.{name}": parameter
            for site in slot.sites
            for name, parameter in modules[site.path].params(adapter, slot.kind).items()
        }
        for slot in placement_of(net, adapter)
    }


def neutral_values(net: PeftModel, adapter: str = ADAPTER) -> dict[str, dict[str, Tensor | float]]:
    """Slot id -> `<path>.<tensor>` -> value at which that tensor changes nothing, most often 0."""
    modules = dict(net.base_model.model.named_modules())
    return {
        slot.id: {
            f"{site.path}.{name}": slot_kind(slot).neutral(name, modules[site.path])
            for site in slot.sites
            for name in modules[site.path].params(adapter, slot.kind)
        }
        for slot in placement_of(net, adapter)
    }


def remove_slots(net: PeftModel, ids: Iterable[str], adapter: str = ADAPTER) -> None:
    """Take modules out exactly; layers left without one become the plain base layer again."""
    gone = _known(net, ids, adapter)
    layers = slot_layers(net, adapter)
    base = net.base_model.model
    for slot_id in gone:
        for layer, kind in layers[slot_id]:
            layer.drop(adapter, kind)
    unwrap(base)
    config = net.peft_config[adapter]
    config.set_placement(config.get_placement().without(gone))


def unwrap(base: nn.Module) -> None:
    """Give layers and attentions on which no module is left their own form back."""
    for name, module in list(base.named_modules()):
        if not isinstance(module, UnionLayer):
            continue
        kinds = [b.kind for by_kind in module.branches.values() for b in by_kind.values()]
        if module.tap is not None and not any(k.needs_source for k in kinds):
            _remove_tap(base, module)
        if not kinds:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.base_layer)
    release(base)


def shrink_slot(net: PeftModel, slot_id: str, keep: Tensor, adapter: str = ADAPTER) -> None:
    """Cut a module to the ranks of `keep`, in all its tied sites. The scaling stays.

    Args:
        net: The peft model.
        slot_id: Which slot.
        keep: Indices of the ranks that stay, (size',), ascending, at least one.
        adapter: Name of the adapter.
    """
    (slot_id,) = _known(net, [slot_id], adapter)
    placement = placement_of(net, adapter)
    slot = next(s for s in placement if s.id == slot_id)
    size = placement.sizes[slot]
    keep = torch.as_tensor(keep, dtype=torch.long).unique()
    if not len(keep) or keep.min() < 0 or keep.max() >= size:
        raise ConfigError(
            f"slot {slot_id} has ranks 0..{size - 1}; got {keep.tolist()}. Keep at least one, or "
            "take the module out with remove_slots."
        )
    kind = slot_kind(slot)
    for layer, name in slot_layers(net, adapter)[slot_id]:
        values = kind.shrunk(layer.params(adapter, name), keep)
        layer.set_params(adapter, name, values)
        layer.branches[adapter][name].size = len(keep)
    sizes = {s: len(keep) if s == slot else n for s, n in placement.sizes.items()}
    net.peft_config[adapter].set_placement(Placement(sizes))


def reset_slots(net: PeftModel, seed: int, adapter: str = ADAPTER) -> None:
    """Give every module the first values of `seed`, in place (parameters stay the same objects)."""
    net.peft_config[adapter].init_seed = seed
    for slot_id, layers in slot_layers(net, adapter).items():
        for layer, kind in layers:
            branch = layer.branches[adapter][kind]
            shapes = branch.kind.shapes(branch.site, branch.size)
            values = branch.kind.init(shapes, layer, seeded(seed, slot_id, branch.site.path))
            with torch.no_grad():
                for name, parameter in layer.params(adapter, kind).items():
                    parameter.copy_(values[name])


def gate_slots(net: PeftModel, gates: Mapping[str, float], adapter: str = ADAPTER) -> None:
    """Multiply the contribution of these slots; 0 hides a module without removing it."""
    layers = slot_layers(net, adapter)
    for slot_id in _known(net, gates, adapter):
        for layer, kind in layers[slot_id]:
            layer.branches[adapter][kind].gate = float(gates[slot_id])


def n_trainable(net: PeftModel, adapter: str = ADAPTER) -> tuple[int, int]:
    """Counted trainable parameters: (in modules, in the task head)."""
    own = {id(p): p.numel() for ps in slot_parameters(net, adapter).values() for p in ps.values()}
    rest = {id(p): p.numel() for p in net.parameters() if p.requires_grad and id(p) not in own}
    return sum(own.values()), sum(rest.values())


def trainable_state(net: PeftModel) -> dict[str, Tensor]:
    """Copies on the CPU of everything that trains (modules and head), by parameter name."""
    return {n: p.detach().cpu().clone() for n, p in net.named_parameters() if p.requires_grad}


def load_trainable_state(
    net: PeftModel, state: Mapping[str, Tensor], *, strict: bool = True
) -> None:
    """Copy values back into the parameters of the same names."""
    own = {n: p for n, p in net.named_parameters() if p.requires_grad}
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    if missing or (strict and extra):
        raise StateError(
            f"saved values do not fit the model: missing {missing[:3]}, extra {extra[:3]}."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _known(net: PeftModel, ids: Iterable[str], adapter: str) -> list[str]:
    known = placement_of(net, adapter).ids
    ids = list(ids)
    unknown = [i for i in ids if i not in known]
    if unknown:
        raise ConfigError(
            f"slots {unknown[:3]} are not on this model; it holds {list(known)[:5]}..."
        )
    return ids


def _remove_tap(base: nn.Module, layer: UnionLayer) -> None:
    for module in base.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is layer.tap:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    layer.tap = None
