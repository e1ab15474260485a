"""Data for training: from files to packed rows of tokens with a loss mask, and the order in which they are seen.

prepare(data, objective, …)  -> Prepared: token sets, packed rows, a report; cached by content
prepare_part(…, shard)       -> one of several parts of that work, for several machines
Order(…).batch(step)         -> the rows of a global batch; share(…) -> those of one rank
collate.collate(rows, …)     -> tensors of one micro-batch (imports torch, so it is not imported here)
"""

from __future__ import annotations

from .order import Order, share
from .packing import pack
from .prepare import Prepared, prepare, prepare_part
from .report import DataReport, SetReport, SourceReport
from .tokens import TokenSet
from .units import JudgedSet, PairSet, Units

__all__ = [
    "DataReport",
    "JudgedSet",
    "Order",
    "PairSet",
    "Prepared",
    "SetReport",
    "SourceReport",
    "TokenSet",
    "Units",
    "pack",
    "prepare",
    "prepare_part",
    "share",
]
