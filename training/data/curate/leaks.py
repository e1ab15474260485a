"""Training rows that hold much of a held-out row: overlap of word n-grams.

A training row leaks when at least `share` of the distinct n-grams of some held-out row stand in it (8 words and one half by default,
as Tulu 3 decontaminates; Lambert et al. 2024, section 3.2). A held-out row shorter than n words is one n-gram, so it leaks into rows
that begin, end or are it only by being equal. Left out: paraphrases; nothing here understands text.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .words import shingles


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

    def leaking(self, words: np.ndarray, lengths: np.ndarray, share: float) -> dict[int, tuple[int, float]]:
        """Place of a training row -> (place of the held-out row it holds most of, share of that row's n-grams)."""
        hashes, counts = shingles(words, lengths, self.n)
        row = np.repeat(np.arange(len(counts)), counts)
        known = np.isin(hashes, self.hashes)
        if not known.any():
            return {}
        both = np.unique(np.stack([row[known].astype(np.uint64), hashes[known]]), axis=1)
        row, hashes = both[0].astype(np.int64), both[1]
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
