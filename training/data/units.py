"""What the batches of an objective are made of: samples, pairs of samples, or samples with a label.

All three have `len`, `lengths` (tokens that a unit takes up in a packed row), `documents(i)` (what the model reads for it,
each (ids, mask)) and `prompt(i)`. `TokenSet` is the first kind. `reference` are log-probabilities of the untrained model
where they were computed beforehand, one column a document. Left out: tensors (`collate.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...launcher.errors import DataError
from . import selection
from .tokens import Sample, TokenSet


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs; both sides of a pair always stand in the same row, and so in the same micro-batch."""

    chosen: TokenSet
    rejected: TokenSet
    reference: np.ndarray | None = None  # float32 [N, 2]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> np.ndarray:
        return self.chosen.lengths + self.rejected.lengths

    @property
    def document_lengths(self) -> np.ndarray:
        """Of every side by itself, which is what `max_length` limits."""
        return np.concatenate([self.chosen.lengths, self.rejected.lengths])

    def documents(self, i: int) -> list[Sample]:
        return [self.chosen.sample(i), self.rejected.sample(i)]

    def prompt(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen.prompt(i)

    def trained(self) -> np.ndarray:
        return self.chosen.trained() + self.rejected.trained()


@dataclass(frozen=True, kw_only=True)
class JudgedSet:
    """Answers with a label. For the estimate of the divergence each prompt is also read with the answer to another one:
    that of unit `other[i]`, the nearest before it (round the end) with another prompt. So the estimate does not depend on
    how a batch is cut; TRL rotates the answers inside each micro-batch instead."""

    samples: TokenSet
    labels: np.ndarray  # bool [N]
    other: np.ndarray  # int64 [N]
    whole: TokenSet  # the same units before the cut at max_length
    max_length: int
    reference: np.ndarray | None = None  # float32 [N, 2]: the unit's own document, the mismatched one

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> np.ndarray:
        """The longer of both documents of a unit: its row has room for either."""
        mixed = np.array([len(self.mismatched(i)[0]) for i in range(len(self))], dtype=np.int64)
        return np.maximum(self.samples.lengths, mixed)

    @property
    def document_lengths(self) -> np.ndarray:
        return self.samples.lengths

    def documents(self, i: int) -> list[Sample]:
        return [self.samples.sample(i)]

    def mismatched(self, i: int) -> Sample:
        """This prompt with the other unit's answer."""
        ids, mask = self.whole.sample(i)
        first = int(mask.argmax())
        ids_other, mask_other = self.whole.sample(int(self.other[i]))
        begin = int(mask_other.argmax())
        ids = np.concatenate([ids[:first], ids_other[begin:]])[: self.max_length]
        mask = np.concatenate([np.zeros(first, np.uint8), mask_other[begin:]])[: self.max_length]
        return ids, mask

    def prompt(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.samples.prompt(i)

    def trained(self) -> np.ndarray:
        return self.samples.trained()


Units = TokenSet | PairSet | JudgedSet


def pairs(samples: TokenSet) -> PairSet:
    """Samples that are two, one behind the other (`split` of their record), as pairs."""
    middle = samples.start + selection.field(samples, "split")
    return PairSet(chosen=replace(samples, stop=middle), rejected=replace(samples, start=middle))


def cut_pairs(units: PairSet, max_length: int, *, drop: bool) -> tuple[PairSet, int, int]:
    """(pairs with both sides at most `max_length` tokens, pairs cut on the right, pairs dropped because a side had nothing
    left that is compared). `drop`: a pair with a longer side is dropped instead of cut."""
    long = (units.chosen.lengths > max_length) | (units.rejected.lengths > max_length)
    if drop:
        keep = np.flatnonzero(~long)
        return _select(units, keep), 0, int(long.sum())
    short = [replace(s, stop=np.minimum(s.stop, s.start + max_length)) for s in (units.chosen, units.rejected)]
    lost = [i for i in np.flatnonzero(long) if not all(s.sample(int(i))[1].any() for s in short)]
    keep = np.setdiff1d(np.arange(len(units)), lost)
    return _select(PairSet(chosen=short[0], rejected=short[1]), keep), int(long.sum()), len(lost)


def _select(units: PairSet, keep: np.ndarray) -> PairSet:
    return PairSet(chosen=units.chosen.select(keep), rejected=units.rejected.select(keep))


def judged(whole: TokenSet, max_length: int, what: str) -> tuple[JudgedSet, int, int]:
    """(units of at most `max_length` tokens, how many were cut, how many dropped because nothing was left to compare).

    Raises DataError when all prompts are equal: there is no other answer then to estimate the divergence with.
    """
    kept = np.flatnonzero(~_lost(whole, max_length))
    samples, truncated, _ = selection.cut(whole, max_length)
    whole, lost = whole.select(kept), len(whole) - len(kept)
    other = _others(selection.field(whole, "prompt"))
    if other is None:
        raise DataError(
            f"{what}: all {len(whole):,} rows have one prompt, and kto estimates how far the model has moved with answers "
            f"to other prompts. Bring rows with at least two."
        )
    labels = selection.field(whole, "label") == 1
    units = JudgedSet(samples=samples, labels=labels, other=other, whole=whole, max_length=max_length)
    return units, truncated, lost


def _lost(samples: TokenSet, max_length: int) -> np.ndarray:
    long = np.flatnonzero(samples.lengths > max_length)
    out = np.zeros(len(samples), bool)
    out[[i for i in long if not samples.sample(int(i))[1][:max_length].any()]] = True
    return out


def _others(prompts: np.ndarray) -> np.ndarray | None:
    """For each place the nearest one before it, round the end, with another value; None when there is none."""
    n = len(prompts)
    if n == 0 or (prompts == prompts[0]).all():
        return None
    last = next(i for i in range(n - 1, -1, -1) if prompts[i] != prompts[0])
    out = np.empty(n, dtype=np.int64)
    for i in range(n):
        out[i] = last if i == 0 else i - 1 if prompts[i - 1] != prompts[i] else out[i - 1]
    return out


def label_counts(labels: Sequence[bool] | np.ndarray) -> tuple[int, int]:
    """(rows with label true, rows with label false)."""
    wanted = int(np.sum(labels))
    return wanted, len(labels) - wanted
