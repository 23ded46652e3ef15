"""Frozen layers run once per row: what is below all modules, and its output for every row."""

from prunepeft.prefix.player import FrozenStack, PrefixPlayer, frozen_prefix
from prunepeft.prefix.reuse import PrefixReuse
from prunepeft.prefix.states import KeptStates, RowStates

__all__ = [
    "FrozenStack",
    "KeptStates",
    "PrefixPlayer",
    "PrefixReuse",
    "RowStates",
    "frozen_prefix",
]
