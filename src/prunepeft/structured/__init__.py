"""Structures of the frozen base model that may go: attention heads and feed-forward neurons."""

from prunepeft.structured.cut import Cut, check_ratio, choose_units, n_removed, removed_params
from prunepeft.structured.groups import Group, Part, find_groups
from prunepeft.structured.light_peft import EarlyScores
from prunepeft.structured.masks import Masks
from prunepeft.structured.surgery import apply_cut
from prunepeft.structured.widths import express

__all__ = [
    "Cut",
    "EarlyScores",
    "Group",
    "Masks",
    "Part",
    "apply_cut",
    "check_ratio",
    "choose_units",
    "express",
    "find_groups",
    "n_removed",
    "removed_params",
]
