"""Pairs of near-duplicates among texts, which of them to drop, and the groups that they form.

Candidates are texts that share one of 16 bands of 4 places of their MinHash signatures (locality-sensitive hashing; Leskovec,
Rajaraman and Ullman, chapter 3); each candidate pair is then compared by its real 3-grams, so no pair is called similar that is not.
What can be missed: measured in tests/training/data/test_duplicates.py. Left out: what a text is made of (`rows.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .texts import Texts
from .words import PERMUTATIONS, distinct

ROWS = 4
BANDS = PERMUTATIONS // ROWS
_SLACK = 0.15  # below the threshold by this much an estimate is not looked at again: 2.6 standard deviations at 0.7
_ALL_PAIRS = 8  # texts of one band value up to which all pairs are candidates; above, each with the first and with the one before


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of places, first[k] < second[k], with their similarity; sorted by second, then first."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    similarity: np.ndarray  # float64 [P]


def similar_pairs(signatures: np.ndarray, texts: Texts, threshold: float) -> Pairs:
    """Pairs of texts with a Jaccard similarity of at least `threshold`. `signatures` uint32 [N, 64] are those of the N texts."""
    first, second = _candidates(signatures)
    keep = np.ones(len(first), bool)
    least = np.ceil((threshold - _SLACK) * PERMUTATIONS)
    for at in range(0, len(first), 1 << 17):
        part = slice(at, at + (1 << 17))
        keep[part] = np.count_nonzero(signatures[first[part]] == signatures[second[part]], axis=1) >= least
    first, second = first[keep], second[keep]
    similarity = texts.similarities(first, second)
    enough = similarity >= threshold
    return Pairs(first=first[enough], second=second[enough], similarity=similarity[enough])


def _candidates(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share a band, each once, sorted by second, then first."""
    count = len(signatures)
    found = [np.empty(0, np.int64)]
    for band in range(BANDS):
        place = signatures[:, band * ROWS : (band + 1) * ROWS]
        keys = place[:, 0].astype(np.uint64)
        with np.errstate(over="ignore"):
            for k in range(1, ROWS):
                keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + place[:, k]
        found.append(_together(keys, count))
    pairs = distinct(np.concatenate(found))
    return pairs % max(count, 1), pairs // max(count, 1)


def _together(keys: np.ndarray, count: int) -> np.ndarray:
    """Pairs of places with equal keys, as second * count + first. Places of one key ascend: the sort is stable."""
    order = np.argsort(keys, kind="stable")
    value = keys[order]
    starts = np.flatnonzero(np.r_[True, value[1:] != value[:-1]]) if count else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, count])
    found = [np.empty(0, np.int64)]
    for size in range(2, _ALL_PAIRS + 1):
        members = order[starts[sizes == size][:, None] + np.arange(size)]
        i, j = np.triu_indices(size, 1)
        found.append((members[:, j] * count + members[:, i]).ravel())
    for start, size in zip(starts[sizes > _ALL_PAIRS].tolist(), sizes[sizes > _ALL_PAIRS].tolist(), strict=True):
        members = order[start : start + size]
        found += [members[1:] * count + members[0], members[2:] * count + members[1:-1]]
    return np.concatenate(found)


def to_drop(pairs: Pairs) -> dict[int, tuple[int, float]]:
    """Place -> (the earlier place that stays and that it resembles, similarity). In order, a text goes when one that stays
    resembles it; what resembles only texts that go, stays."""
    gone: dict[int, tuple[int, float]] = {}
    for i, j, similarity in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), strict=True):
        if i not in gone and j not in gone:
            gone[j] = (i, similarity)
    return gone


def groups(count: int, *links: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int64 [count]: the least place that each can be reached from over any of the links."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, second in links:
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            a, b = root(i), root(j)
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(count)], np.int64)


def equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Links between each place and the first with the same key."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    owner = first[group]
    later = np.flatnonzero(owner != np.arange(len(keys)))
    return owner[later], later
