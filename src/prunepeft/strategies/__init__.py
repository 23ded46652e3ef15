"""Ways to search: one file each, registered here."""

from prunepeft.strategies.base import METHODS, Problem, SearchResult, Strategy
from prunepeft.strategies.hybrid_pruning import HybridPruning
from prunepeft.strategies.light_peft import LightPeft

METHODS.register("prunepeft", HybridPruning)
METHODS.register("light-peft", LightPeft)

__all__ = ["METHODS", "HybridPruning", "LightPeft", "Problem", "SearchResult", "Strategy"]
