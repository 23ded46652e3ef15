"""The supernet: a peft tuner that holds every kind of module at once."""

from prunepeft.supernet.attach import (
    attach,
    base_of,
    detach,
    gate_slots,
    load_trainable_state,
    n_trainable,
    neutral_values,
    placement_of,
    remove_slots,
    reset_slots,
    shrink_slot,
    slot_layers,
    slot_parameters,
    trainable_state,
)
from prunepeft.supernet.tuner import UnionConfig, UnionModel, register

__all__ = [
    "UnionConfig",
    "UnionModel",
    "attach",
    "base_of",
    "detach",
    "gate_slots",
    "load_trainable_state",
    "n_trainable",
    "neutral_values",
    "placement_of",
    "register",
    "remove_slots",
    "reset_slots",
    "shrink_slot",
    "slot_layers",
    "slot_parameters",
    "trainable_state",
]
