"""Kinds of PEFT module; every one is a line here."""

from prunepeft.kinds.alore import Alore
from prunepeft.kinds.base import (
    KINDS,
    Kind,
    cost,
    count_params,
    make_kind,
    n_params,
    seeded,
    slot_cost,
    slot_kind,
)
from prunepeft.kinds.bitfit import BitFit
from prunepeft.kinds.dora import Dora
from prunepeft.kinds.ether import Ether, EtherPlus
from prunepeft.kinds.ia3 import Ia3
from prunepeft.kinds.lnfit import LnFit
from prunepeft.kinds.lora import Lora
from prunepeft.kinds.loretta_adp import LorettaAdp
from prunepeft.kinds.loretta_rep import LorettaRep
from prunepeft.kinds.low_rank_adapter import LowRankAdapter
from prunepeft.kinds.neutral import off_neutral
from prunepeft.kinds.parallel_adapter import ParallelAdapter
from prunepeft.kinds.prefix import Prefix
from prunepeft.kinds.serial_adapter import SerialAdapter
from prunepeft.kinds.ssl import Ssb, Ssl

KINDS.register("lora", Lora)
KINDS.register("dora", Dora)
KINDS.register("ia3", Ia3)
KINDS.register("serial_adapter", SerialAdapter)
KINDS.register("parallel_adapter", ParallelAdapter)
KINDS.register("low_rank_adapter", LowRankAdapter)
KINDS.register("ether", Ether)
KINDS.register("ether_plus", EtherPlus)
KINDS.register("ssl", Ssl)
KINDS.register("ssb", Ssb)
KINDS.register("alore", Alore)
KINDS.register("loretta_adp", LorettaAdp)
KINDS.register("loretta_rep", LorettaRep)
KINDS.register("prefix", Prefix)
KINDS.register("bitfit", BitFit)
KINDS.register("lnfit", LnFit)

__all__ = [
    "KINDS",
    "Alore",
    "BitFit",
    "Dora",
    "Ether",
    "EtherPlus",
    "Ia3",
    "Kind",
    "LnFit",
    "Lora",
    "LowRankAdapter",
    "LorettaAdp",
    "LorettaRep",
    "ParallelAdapter",
    "Prefix",
    "SerialAdapter",
    "Ssb",
    "Ssl",
    "cost",
    "count_params",
    "make_kind",
    "n_params",
    "off_neutral",
    "seeded",
    "slot_cost",
    "slot_kind",
]
