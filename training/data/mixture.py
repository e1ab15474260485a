"""Which samples train and which are held out, as the data section asks: curated or not, weighted, with general data mixed in.

Arithmetic on the records of stores that are tokenized already (`selection.py`). Left out: lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...launcher.schema import Data
from . import preflight, selection
from .curate import Decision
from .store import Store
from .tokens import TokenSet


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`leaked` samples were removed from train as they stand in the held-out set too, `shared` have only their prompt in common with
    it. `weights` of the training sources, general ones last, as they were used; `general` is how many of the samples those are."""

    train: TokenSet
    held: TokenSet | None
    leaked: int
    shared: int
    weights: tuple[float, ...]
    general: int


def mix(
    data: Data, stores: Sequence[Store], own_eval: Sequence[Store], decision: Decision | None, seed: int
) -> Mixture:
    """`stores` are those of data.train, then data.general's. Raises DataError when nothing is left to train on."""
    train = selection.whole(stores)
    held: TokenSet | None = None
    leaked = shared = 0
    specific = len(data.train)
    if decision and decision.held is not None:
        if any(len(places) for places in decision.held):
            held = selection.decided(train, decision.held)
    elif isinstance(data.eval, float) and data.eval > 0:
        own, general = _apart(train, specific)
        kept, held = selection.hold_out(own, data.eval, seed)
        train = selection.joined(kept, general)
    if decision:
        train = selection.decided(train, decision.train)
    if own_eval:
        held = selection.whole(own_eval)
    if held is not None:
        train, leaked, shared = selection.remove_leaks(train, held)
        preflight.check_empty(len(train), "the training data", f": all {leaked:,} samples stand in data.eval too")
    weights = _weights(data, np.bincount(train.source, minlength=len(stores)))
    train = selection.weigh(train, weights, seed)
    preflight.check_empty(len(train), "the training data", ": the weights leave no sample")
    general_rows = int((train.source >= specific).sum())
    return Mixture(train=train, held=held, leaked=leaked, shared=shared, weights=tuple(weights), general=general_rows)


def _apart(samples: TokenSet, specific: int) -> tuple[TokenSet, TokenSet]:
    """Samples of the first `specific` sources, and of the others."""
    mine = samples.source < specific
    return samples.select(np.flatnonzero(mine)), samples.select(np.flatnonzero(~mine))


def _weights(data: Data, counts: np.ndarray) -> list[float]:
    """As written for data.train; general data are scaled so that they make up data.general.share of all rows."""
    weights = [source.weight for source in data.train]
    if data.general is None:
        return weights
    own = float(np.dot(weights, counts[: len(weights)]))
    theirs = [source.weight for source in data.general.sources]
    there = float(np.dot(theirs, counts[len(weights) :]))
    preflight.check_empty(int(there > 0), "data.general", ": no row of it is left")
    scale = data.general.share / (1 - data.general.share) * own / there
    return [*weights, *(weight * scale for weight in theirs)]
