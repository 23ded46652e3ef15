"""Other sizes for a slot, at the scaling that it had."""

from collections.abc import Sequence
from dataclasses import replace

from prunepeft.kinds import slot_kind
from prunepeft.space import Slot


def with_sizes(slot: Slot, sizes: Sequence[int]) -> Slot:
    """The slot with these sizes and the scaling that it had, which its largest size fixes.

    Args:
        slot: A slot of a kind whose scaling is proportional to `alpha`, or the same for all sizes.
        sizes: Ascending.
    """
    kind, largest = slot_kind(slot), sizes[-1]
    scaling, options = kind.scaling(slot.sizes[-1]), dict(slot.options)
    if kind.scaling(largest) != scaling:
        options["alpha"] = 1.0
        unit = slot_kind(replace(slot, options=tuple(sorted(options.items())))).scaling(largest)
        options["alpha"] = scaling / unit
    return replace(slot, sizes=tuple(sizes), options=tuple(sorted(options.items())))
