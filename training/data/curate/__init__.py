"""Curation of training rows: filters, duplicates, balance, and a held-out set without leaks; each step counted.

curate(data, kind, seed, cache) -> Decision: which rows of which source train, which are held out, and why the others do neither
"""

from __future__ import annotations

from .decide import Decision, curate, training_sources
from .rows import Maker

__all__ = ["Decision", "Maker", "curate", "training_sources"]
