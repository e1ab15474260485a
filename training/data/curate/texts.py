"""The numbered words of all rows of several sheets as one list, many texts in one call, and how similar pairs of them are.

Reading text by text costs 20 us each, and comparing pair by pair 100 us (seen, 100 words a text, 2 cores), so everything here takes
arrays of places. Left out: which pairs are worth comparing (`duplicates.py`), n-grams and their hashes (`words.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .words import distinct, shingles, within

_AT_ONCE = 1 << 21  # words that are looked at in one call: about 300 MB of arrays


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Text i is `lengths[i]` words from `start[i]` on in `files[file[i]]`; the files are memory maps."""

    files: Sequence[np.ndarray]  # uint32 [M] each
    file: np.ndarray  # int64 [N]
    start: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [N]

    def select(self, places: np.ndarray) -> Texts:
        return Texts(files=self.files, file=self.file[places], start=self.start[places], lengths=self.lengths[places])

    def take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint32, the texts joined; int64, their lengths)."""
        lengths = self.lengths[places]
        at = np.repeat(self.start[places], lengths) + within(lengths)
        if len(self.files) == 1:
            return np.asarray(self.files[0])[at], lengths
        out, owner = np.empty(len(at), np.uint32), np.repeat(self.file[places], lengths)
        for number in np.unique(self.file[places]).tolist():
            mine = owner == number
            out[mine] = np.asarray(self.files[number])[at[mine]]
        return out, lengths

    def chunks(self, *columns: np.ndarray) -> Iterator[slice]:
        """Parts of the places in `columns` (side by side, as the two of a pair) whose texts are small enough for one call."""
        words = np.cumsum(np.sum([self.lengths[column] for column in columns], axis=0))
        at = 0
        while at < len(words):
            stop = int(np.searchsorted(words, (words[at - 1] if at else 0) + _AT_ONCE, "right"))
            yield slice(at, max(stop, at + 1))
            at = max(stop, at + 1)

    def similarities(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """float64 [P]: Jaccard similarity of the sets of 3-grams of text first[k] and text second[k], exactly (up to equal hashes of
        64 bits)."""
        out = np.empty(len(first))
        for part in self.chunks(first, second):
            places, local = np.unique(np.stack([first[part], second[part]]), return_inverse=True)
            out[part] = jaccard(*self.take(places), *local.reshape(2, -1))
        return out


def jaccard(words: np.ndarray, lengths: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [P]: for each pair of the texts that `words` joins. The 3-grams are counted through, so that (text, number of its
    3-gram) is one integer; the smaller set of each pair is then looked up in the other."""
    hashes, counts = shingles(words, lengths)
    order = np.argsort(hashes)
    numbers = np.empty(len(hashes), np.int64)
    ordered = hashes[order]
    numbers[order] = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])
    most = len(hashes)
    sets = distinct(np.repeat(np.arange(len(counts)), counts) * most + numbers)  # one text after another
    sizes = np.bincount(sets // most, minlength=len(counts))
    smaller = sizes[first] <= sizes[second]
    few, many = np.where(smaller, first, second), np.where(smaller, second, first)
    asked = sizes[few]
    at = np.repeat((np.cumsum(sizes) - sizes)[few], asked) + within(asked)
    wanted = sets[at] + np.repeat((many - few) * most, asked)
    found = sets[np.minimum(np.searchsorted(sets, wanted), len(sets) - 1)] == wanted
    common = np.bincount(np.repeat(np.arange(len(few)), asked), weights=found, minlength=len(few))
    return common / (sizes[first] + sizes[second] - common)
