"""Ways to search: one file each, registered here."""

from prunepeft.strategies.asha import SuccessiveHalving
from prunepeft.strategies.base import METHODS, Problem, SearchResult, Strategy
from prunepeft.strategies.black_box import BlackBox
from prunepeft.strategies.evolution import Evolution
from prunepeft.strategies.hybrid_pruning import HybridPruning
from prunepeft.strategies.light_peft import LightPeft
from prunepeft.strategies.random_search import RandomSearch
from prunepeft.strategies.s3delta import S3Delta
from prunepeft.strategies.s_mam import SMam

METHODS.register("prunepeft", HybridPruning)
METHODS.register("light-peft", LightPeft)
METHODS.register("smam", SMam)
METHODS.register("s3delta", S3Delta)
METHODS.register("random", RandomSearch)
METHODS.register("asha", SuccessiveHalving)
METHODS.register("evolution", Evolution)

__all__ = [
    "METHODS",
    "BlackBox",
    "Evolution",
    "HybridPruning",
    "LightPeft",
    "Problem",
    "RandomSearch",
    "S3Delta",
    "SMam",
    "SearchResult",
    "Strategy",
    "SuccessiveHalving",
]
