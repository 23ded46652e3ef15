"""From a trained supernet to a smaller base: what is cut away, kept or merged."""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from prunepeft.space import Placement
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group
from prunepeft.structured.surgery import apply_cut
from prunepeft.supernet import detach, placement_of, remove_slots, shrink_slot, trainable_state
from prunepeft.supernet.attach import ADAPTER


def cut_and_keep(
    net: PeftModel,
    groups: Sequence[Group],
    cut: Cut | None,
    keep_ranks: Mapping[str, Sequence[int]],
) -> tuple[Placement, dict[str, Tensor]]:
    """Cut the base in place, keep some modules at some of their ranks, and take them off.

    The base also keeps its trained head.

    Args:
        net: The trained supernet.
        groups: Of the base model before the cut.
        cut: What stays of the base; None leaves it whole.
        keep_ranks: Slot id -> ranks that stay, ascending; slots that are not named go.
    Returns:
        The placement on the cut base, and the values of all that trains.
    """
    sizes = {s.id: n for s, n in placement_of(net).sizes.items()}
    remove_slots(net, [i for i in sizes if not keep_ranks.get(i)])
    for slot_id, ranks in keep_ranks.items():
        if 0 < len(ranks) < sizes[slot_id]:
            shrink_slot(net, slot_id, torch.tensor(ranks))
    if cut is not None:
        apply_cut(net, groups, cut)
    kept, values = placement_of(net), trainable_state(net)
    _keep_heads(net)
    detach(net)
    return kept, values


def _keep_heads(net: PeftModel) -> None:
    """Give the base model the values its head was trained to."""
    for module in net.modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[ADAPTER].state_dict()
            module.original_module.load_state_dict(trained)


def cut_and_merge(net: PeftModel, groups: Sequence[Group], cut: Cut | None) -> None:
    """Cut the base in place, and merge the modules and the trained head into it.

    Args:
        net: The trained supernet; its kinds must be mergeable.
        groups: Of the base model before the cut.
        cut: What stays of the base; None leaves it whole.
    """
    if cut is not None:
        apply_cut(net, groups, cut)
    trainable = getattr(net, "_prunepeft_was_trainable", ())
    base = net.merge_and_unload()
    if getattr(base, "_require_grads_hook", None) is not None:
        base.disable_input_require_grads()
    for parameter in trainable:
        parameter.requires_grad_(True)
    base.zero_grad(set_to_none=True)
