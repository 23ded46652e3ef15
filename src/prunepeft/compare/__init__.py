"""Which search is worth its cost: runs of several methods at equal budgets, and what they show."""

from prunepeft.compare.comparison import Cell, make_comparison
from prunepeft.compare.job import compare, compare_runs

__all__ = ["Cell", "compare", "compare_runs", "make_comparison"]
