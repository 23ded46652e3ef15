"""Ways to search: one file each, registered here."""

from prunepeft.strategies.adalora import AdaLora
from prunepeft.strategies.allocator import Allocator
from prunepeft.strategies.asha import SuccessiveHalving
from prunepeft.strategies.autopeft import AutoPeft
from prunepeft.strategies.base import METHODS, Problem, SearchResult, Strategy
from prunepeft.strategies.bipeft import Bipeft
from prunepeft.strategies.black_box import BlackBox
from prunepeft.strategies.eva import Eva
from prunepeft.strategies.evolution import Evolution
from prunepeft.strategies.fisher import Fisher
from prunepeft.strategies.gora import GoRa
from prunepeft.strategies.hybrid_pruning import HybridPruning
from prunepeft.strategies.kappatune import KappaTune
from prunepeft.strategies.light_peft import LightPeft
from prunepeft.strategies.lora_drop import LoraDrop
from prunepeft.strategies.random_search import RandomSearch
from prunepeft.strategies.s3delta import S3Delta
from prunepeft.strategies.s_mam import SMam

METHODS.register("prunepeft", HybridPruning)
METHODS.register("light-peft", LightPeft)
METHODS.register("autopeft", AutoPeft)
METHODS.register("smam", SMam)
METHODS.register("s3delta", S3Delta)
METHODS.register("bipeft", Bipeft)
METHODS.register("random", RandomSearch)
METHODS.register("asha", SuccessiveHalving)
METHODS.register("evolution", Evolution)
METHODS.register("eva", Eva)
METHODS.register("gora", GoRa)
METHODS.register("fisher", Fisher)
METHODS.register("lora_drop", LoraDrop)
METHODS.register("kappatune", KappaTune)
METHODS.register("adalora", AdaLora)

__all__ = [
    "METHODS",
    "AutoPeft",
    "Bipeft",
    "AdaLora",
    "Allocator",
    "BlackBox",
    "Eva",
    "Evolution",
    "Fisher",
    "GoRa",
    "HybridPruning",
    "KappaTune",
    "LightPeft",
    "LoraDrop",
    "Problem",
    "RandomSearch",
    "S3Delta",
    "SMam",
    "SearchResult",
    "Strategy",
    "SuccessiveHalving",
]
