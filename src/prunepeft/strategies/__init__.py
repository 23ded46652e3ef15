"""Ways to search: one file each, registered here."""

from prunepeft.strategies.base import METHODS, Problem, SearchResult, Strategy
from prunepeft.strategies.hybrid_pruning import HybridPruning

METHODS.register("prunepeft", HybridPruning)

__all__ = ["METHODS", "HybridPruning", "Problem", "SearchResult", "Strategy"]
