"""Put an adapter of a pruned base on the unpruned one: its tensors go back to full width.

The missing coordinates change nothing. The function is not that of the pruned model, because the
heads and neurons that were taken out act again; for that one cut the unpruned model with
`load_cut`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.kinds import Kind, seeded
from prunepeft.space import Placement, Site
from prunepeft.state import write_folder
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group
from prunepeft.structured.masks import check_cut
from prunepeft.supernet.export.peft_form import write_checkpoint
from prunepeft.supernet.export.source import KEY, Module, SavedAdapter, read_adapter
from prunepeft.supernet.layer import PREFIX
from prunepeft.supernet.tuner import UnionConfig

# (path, side) -> (features of the layer before the cut, those that stay, ascending)
Widths = Mapping[tuple[str, str], tuple[int, Tensor]]


def scatter_adapter(
    adapter: str | os.PathLike[str],
    cut: Cut,
    groups: Sequence[Group],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
) -> Placement:
    """Write an adapter of a pruned base in a form that fits the unpruned base.

    Rows and columns of every tensor go to their old places; the others get the value that changes
    nothing (0, or 1 where the tensor multiplies). So the update of a weight is 0 at every
    coordinate that was taken out.

    Args:
        adapter: Folder of the adapter.
        cut: What was kept of the base.
        groups: `find_groups` of the unpruned model.
        output: Folder to make.
        base: Folder or hub id of the unpruned base, for the adapter's config.
    Returns:
        The placement on the unpruned base.
    Raises:
        ConfigError: if a module on a cut layer has no form of another width, or the output is in
            use.
        CheckpointError: if the adapter is damaged or does not belong to this cut.
    """
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"the output {place} is in use; give a new folder. Nothing was changed.")
    check_cut(groups, cut)
    saved = read_adapter(Path(adapter))
    widths = _widths(groups, cut)
    tensors = {
        f"{KEY}{module.site.path}.{PREFIX}{module.kind.name}_{name}": tensor
        for module in saved.modules
        for name, tensor in _scattered(module, widths).items()
    }
    tensors |= {KEY + name: tensor for name, tensor in saved.head.items()}
    placement = _full_placement(saved, widths)
    config = UnionConfig(
        placement=placement.to_dict(),
        init_seed=saved.init_seed,
        modules_to_save=list(saved.modules_to_save) or None,
        task_type=saved.task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    write_folder(place, lambda f: write_checkpoint(f, config, tensors, saved.auto_mapping))
    return placement


def _widths(groups: Sequence[Group], cut: Cut) -> Widths:
    return {
        (part.path, part.side): (
            group.n_units * sum(size for _, size in part.segments),
            part.features(cut.keep[group.id]),
        )
        for group in groups
        if group.id in cut.keep
        for part in group.parts
    }


def _full_placement(saved: SavedAdapter, widths: Widths) -> Placement:
    return Placement(
        {
            replace(slot, sites=tuple(_full_site(site, widths) for site in slot.sites)): size
            for slot, size in saved.placement.sizes.items()
        }
    )


def _full_site(site: Site, widths: Widths) -> Site:
    """The site with the widths from before the cut."""
    full = {"in": site.d_in, "out": site.d_out}
    for side, found in list(full.items()):
        n, stays = widths.get((site.path, side), (found, range(found)))
        if len(stays) != found:
            raise CheckpointError(
                f"the adapter's layer {site.path!r} has {found} {side}put features, but the cut "
                f"leaves {len(stays)} of {n}; it is the adapter of another base. Give the cut that "
                "was saved with its base (cut.json)."
            )
        full[side] = n
    return replace(site, d_in=full["in"], d_out=full["out"])


def _scattered(module: Module, widths: Widths) -> dict[str, Tensor]:
    """A module's tensors at full width."""
    site, kind = _full_site(module.site, widths), module.kind
    result = dict(module.tensors)
    for side in ("in", "out"):
        n, stays = widths.get((site.path, side), (0, torch.empty(0)))
        if n == len(stays):
            continue
        axes = kind.feature_axes(module.site, side)
        reaches_all = side == "out" and not axes  # it has no number of its own for each output
        if axes is None or reaches_all or kind.reads_weight or "attention" in kind.stages(site):
            raise ConfigError(
                f"{kind.name} on {site.path!r} cannot be put on the unpruned base: it would change "
                "the features that were taken out as well. Load it on the cut model "
                "(prunepeft.load_cut), or train kinds such as lora, ia3 or bitfit."
            )
        neutral = _neutral(kind, site, module.size)
        for name, axis in axes.items():
            small = result[name]
            shape = list(small.shape)
            shape[axis] = n
            full = torch.full(shape, neutral[name], dtype=small.dtype)
            result[name] = full.index_copy(axis, stays, small)
    return result


def _neutral(kind: Kind, site: Site, size: int) -> dict[str, float]:
    """Tensor name -> 1 if a fresh module is made of ones there, else 0."""
    fresh = kind.init(kind.shapes(site, size), None, seeded(0))  # type: ignore[arg-type]
    return {name: float(bool(torch.all(value == 1))) for name, value in fresh.items()}
