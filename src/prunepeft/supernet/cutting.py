"""Cut a linear layer to some of its features, in step with every module on it.

A module whose tensors lie along the features is sliced (`Kind.cut`). One that mixes them is folded
into the frozen weight before the cut and starts again at the new width. Either way the layer
computes what it did for inputs that are zero at the features that go.
"""

from collections.abc import Mapping
from dataclasses import replace

from peft import PeftModel
from torch import Tensor, nn

from prunepeft.errors import ConfigError, StateError
from prunepeft.kinds.base import STAGES
from prunepeft.sites import linear_dims
from prunepeft.space import Placement, Slot
from prunepeft.supernet.attach import base_of, unwrap
from prunepeft.supernet.folding import Module, drop, modules_of, restart, set_frozen, with_nearer
from prunepeft.supernet.layer import Branch, UnionLayer
from prunepeft.supernet.slicing import check_sliceable, slice_layer

Kept = tuple[Tensor | None, Tensor | None]  # output features, input features


def check_cut(model: nn.Module, cuts: Mapping[str, Kept]) -> None:
    """Raise an error unless `cut_layer` can do all of this; nothing is changed.

    Args:
        model: A plain model or a peft model with modules.
        cuts: Path of a layer in the base model -> output and input features that stay, ascending;
            None: all.
    Raises:
        ConfigError: if a layer is not a plain linear one, or carries a module that can be neither
            cut nor folded.
        StateError: if modules are merged, or one that has to be folded has a gate.
    """
    base = base_of(model)
    stuck: dict[str, list[str]] = {}
    for path, (rows, cols) in cuts.items():
        layer = base.get_submodule(path)
        for kind in _stuck_kinds(path, layer, rows, cols):
            stuck.setdefault(kind, []).append(path)
    if stuck:
        found = "; ".join(f"{kind} on {', '.join(paths)}" for kind, paths in stuck.items())
        raise ConfigError(
            f"these layers cannot lose features, because a module on them mixes all of their "
            f"outputs and cannot be folded into the weight: {found}. Take these modules off "
            "(remove_slots), place them on the roles o and down, or cut another structure."
        )


def cut_layer(
    net: PeftModel | None,
    path: str,
    layer: nn.Module,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> None:
    """Cut a linear layer and the modules on it, in place and for good.

    `Branch.site` and the placements in the adapters' configs follow. A module that has to be folded
    goes, with a log line, if it does not fit the new width or would have nothing to act on. A layer
    that lost its last module becomes the plain layer again. Make optimizers after the cut.

    Args:
        net: The peft model; None if the layer belongs to none.
        path: Path of the layer in the base model.
        layer: The layer, plain or wrapped.
        rows: Output features that stay, ascending, (d_out',); None: all.
        cols: Input features that stay, (d_in',); None: all.
    Raises:
        ConfigError, StateError: see `check_cut`; a caller with several layers calls that first.
    """
    check_cut(nn.ModuleDict({"layer": layer}), {"layer": (rows, cols)})
    if not isinstance(layer, UnionLayer):
        slice_layer(layer, rows, cols)
        return
    rows, cols = _without_whole(layer, rows, cols)
    orders = {adapter: list(branches) for adapter, branches in layer.branches.items()}
    void, folded = _plan(layer, rows, cols)
    for adapter, branch in void:
        drop(layer, adapter, branch, "its layer has no output left")
    gone = {id(branch) for _, branch in folded}
    for adapter, branch in (m for m in modules_of(layer) if id(m[1]) not in gone):
        _cut_module(layer, adapter, branch, rows, cols)
    if folded:
        set_frozen(layer, *layer.merged_with(folded))
    slice_layer(layer.get_base_layer(), rows, cols)
    layer._row_norm = None
    for adapter, branch in sorted(folded, key=_restart_order):
        restart(layer, adapter, branch, net.peft_config[adapter].init_seed if net else 0)
    for adapter, order in orders.items():
        if left := layer.branches.get(adapter):
            layer.branches[adapter] = {kind: left[kind] for kind in order if kind in left}
        if net is not None:
            _follow(net, path, layer, adapter)
    if net is not None and not layer.branches:
        unwrap(net.base_model.model)


def _stuck_kinds(path: str, layer: nn.Module, rows: Tensor | None, cols: Tensor | None) -> set[str]:
    """Kinds on the layer that would have to be folded and cannot be."""
    if not isinstance(layer, UnionLayer):
        check_sliceable(path, layer)
        return set()
    check_sliceable(path, layer.get_base_layer())
    if layer.merged:
        raise StateError(
            f"{path} cannot be cut while its modules are merged into it; call unmerge_adapter()."
        )
    _, folded = _plan(layer, *_without_whole(layer, rows, cols))
    if any(b.is_gated for _, b in folded):
        kinds = ", ".join(b.kind.name for _, b in folded)
        raise StateError(
            f"{path} cannot be cut while its modules have gates: {kinds} would be folded into the "
            "weight. Set the gates back to 1 (gate_slots), or take the modules off (remove_slots)."
        )
    if folded and len(layer.branches) > 1:
        raise ConfigError(
            f"{path} carries modules of the adapters {', '.join(layer.branches)}, and the cut "
            f"would fold {folded[0][1].kind.name} into the weight that all of them share. Delete "
            "the other adapters first."
        )
    return {b.kind.name for _, b in folded if not b.kind.mergeable}


def _without_whole(layer: UnionLayer, rows: Tensor | None, cols: Tensor | None) -> Kept:
    """The same features, with None where all stay."""
    d_in, d_out = linear_dims(layer.get_base_layer())
    rows = None if rows is None or len(rows) == d_out else rows
    return rows, None if cols is None or len(cols) == d_in else cols


def _plan(
    layer: UnionLayer, rows: Tensor | None, cols: Tensor | None
) -> tuple[list[Module], list[Module]]:
    """Modules that go with the layer's last output, and modules to fold into its weight."""
    modules = modules_of(layer)
    if rows is not None and not len(rows):
        return modules, []
    return [], with_nearer(layer, [m for m in modules if _has_no_cut(m[1], rows, cols)])


def _has_no_cut(branch: Branch, rows: Tensor | None, cols: Tensor | None) -> bool:
    """Whether the module mixes features of a side that is cut, or acts on inputs that all go."""
    kind, site = branch.kind, branch.site
    if rows is not None and kind.feature_axes(site, "out") is None:
        return True
    return cols is not None and (
        kind.feature_axes(site, "in") is None
        or bool(not len(cols) and kind.feature_axes(site, "in"))
    )


def _restart_order(module: Module) -> tuple[bool, int]:
    """The last to act first, as undoing wants it; those that read the weight when it is final."""
    branch = module[1]
    return branch.kind.reads_weight, -STAGES.index(branch.stages[-1])


def _cut_module(
    layer: UnionLayer, adapter: str, branch: Branch, rows: Tensor | None, cols: Tensor | None
) -> None:
    params = {k: v.detach() for k, v in layer.params(adapter, branch.kind.name).items()}
    values = branch.kind.cut(params, branch.site, rows, cols, branch.scaling, layer)
    if values is None:
        raise ConfigError(f"kind {branch.kind.name!r} says by its axes that it can be cut.")
    layer.set_params(adapter, branch.kind.name, values)
    d_out = branch.site.d_out if rows is None else len(rows)
    d_in = branch.site.d_in if cols is None else len(cols)
    branch.site = replace(branch.site, d_in=d_in, d_out=d_out)


def _follow(net: PeftModel, path: str, layer: UnionLayer, adapter: str) -> None:
    """Bring an adapter's placement in step with what is on the layer now."""
    d_in, d_out = linear_dims(layer.get_base_layer())
    left = layer.branches.get(adapter, {})
    config = net.peft_config[adapter]
    sizes: dict[Slot, int] = {}
    for slot, size in config.get_placement().sizes.items():
        sites = tuple(
            replace(site, d_in=d_in, d_out=d_out) if site.path == path else site
            for site in slot.sites
            if site.path != path or slot.kind in left
        )
        if not sites:
            continue
        new = replace(slot, sites=sites)
        sizes[new] = size
        if new.id != slot.id:
            for site in sites:
                other = net.base_model.model.get_submodule(site.path)
                other.branches[adapter][slot.kind].slot_id = new.id
    config.set_placement(Placement(sizes))
