"""Training rows that hold much of a held-out row: overlap of word n-grams.

A training row leaks when at least `share` of the distinct n-grams of some held-out row stand in it (8 words and one half by default,
as Tulu 3 decontaminates; Lambert et al. 2024, section 3.2). A held-out row shorter than n words is one n-gram, so it leaks into rows
that begin, end or are it only by being equal. Left out: paraphrases; nothing here understands text.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .words import shingles

_BITS = 24
_SHIFT = np.uint64(64 - _BITS)  # of a hash its upper bits; 16 MB say which of them a held-out n-gram has


class HeldOut:
    """The n-grams of the held-out rows, ready to be looked up."""

    def __init__(self, words: np.ndarray, lengths: np.ndarray, n: int):
        hashes, counts = shingles(words, lengths, n)
        owner = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((owner, hashes))
        hashes, owner = hashes[order], owner[order]
        fresh = (
            np.r_[True, (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])] if len(hashes) else np.empty(0, bool)
        )
        self.n, self.hashes, self.owner = n, hashes[fresh], owner[fresh]
        self.distinct = np.bincount(self.owner, minlength=len(counts))
        self._seen = np.zeros(1 << _BITS, bool)
        self._seen[self.hashes >> _SHIFT] = True

    def leaking(self, words: np.ndarray, lengths: np.ndarray, share: float) -> dict[int, tuple[int, float]]:
        """Place of a training row -> (place of the held-out row it holds most of, share of that row's n-grams)."""
        hashes, counts = shingles(words, lengths, self.n)
        perhaps = np.flatnonzero(self._seen[hashes >> _SHIFT])  # of a million rows, all but a few end here
        begin = np.minimum(np.searchsorted(self.hashes, hashes[perhaps]), len(self.hashes) - 1)
        perhaps = perhaps[self.hashes[begin] == hashes[perhaps]]
        if not len(perhaps):
            return {}
        row, hashes = np.repeat(np.arange(len(counts)), counts)[perhaps], hashes[perhaps]
        order = np.lexsort((hashes, row))
        row, hashes = row[order], hashes[order]
        fresh = np.r_[True, (row[1:] != row[:-1]) | (hashes[1:] != hashes[:-1])]
        row, hashes = row[fresh], hashes[fresh]
        begin = np.searchsorted(self.hashes, hashes, "left")
        many = np.searchsorted(self.hashes, hashes, "right") - begin
        at = np.repeat(begin, many) + np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        pairs, hits = np.unique(np.repeat(row, many) * len(self.distinct) + self.owner[at], return_counts=True)
        rows, held = np.divmod(pairs, len(self.distinct))
        part = hits / self.distinct[held]
        return _largest(zip(rows.tolist(), held.tolist(), part.tolist(), strict=True), share)


def _largest(found: Iterable[tuple[int, int, float]], share: float) -> dict[int, tuple[int, float]]:
    out: dict[int, tuple[int, float]] = {}
    for row, held, part in found:
        if part >= share and (row not in out or part > out[row][1]):
            out[row] = (held, part)
    return out
