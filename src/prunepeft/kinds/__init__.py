"""Kinds of PEFT module; every one is a line here."""

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
from prunepeft.kinds.ia3 import Ia3
from prunepeft.kinds.lnfit import LnFit
from prunepeft.kinds.lora import Lora
from prunepeft.kinds.parallel_adapter import ParallelAdapter
from prunepeft.kinds.serial_adapter import SerialAdapter

KINDS.register("lora", Lora)
KINDS.register("dora", Dora)
KINDS.register("ia3", Ia3)
KINDS.register("serial_adapter", SerialAdapter)
KINDS.register("parallel_adapter", ParallelAdapter)
KINDS.register("bitfit", BitFit)
KINDS.register("lnfit", LnFit)

__all__ = [
    "KINDS",
    "BitFit",
    "Dora",
    "Ia3",
    "Kind",
    "LnFit",
    "Lora",
    "ParallelAdapter",
    "SerialAdapter",
    "cost",
    "count_params",
    "make_kind",
    "n_params",
    "seeded",
    "slot_cost",
    "slot_kind",
]
