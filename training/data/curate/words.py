"""Texts as arrays of numbered words, their 3-grams, and MinHash signatures of those, for many texts in one call.

A word is a run of letters, digits and underscores in lower case, an arithmetic sign (or `5 + 3` would equal `5 - 3`), or a single
character of a script that is written without spaces. Words are numbered by their CRC-32: two of 100,000 words share a number with
probability 0.7, which changes a similarity by less than a thousandth. Left out: which pairs are compared (`duplicates.py`).
"""

from __future__ import annotations

import re
import zlib

import numpy as np

PERMUTATIONS = 64
SHINGLE = 3  # words
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[-+*/=<>^%]")
_LARGEST = 1_000_000  # words remembered; more are numbered anew each time
_P = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))  # odd, random bits


class Numbering(dict[str, int]):
    """Words to their numbers, remembered: most words of a text have been seen before."""

    def __missing__(self, word: str) -> int:
        number = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        if len(self) < _LARGEST:
            self[word] = number
        return number

    def words(self, text: str) -> list[int]:
        return list(map(self.__getitem__, _WORD.findall(text.lower())))


def filled(words: list[int]) -> list[int]:
    """At least SHINGLE of them: fewer are filled up with zeros, so that every text has a 3-gram."""
    return words + [0] * (SHINGLE - len(words))


def shingles(words: np.ndarray, lengths: np.ndarray, n: int = SHINGLE) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes of the n-grams of all texts, one text after another; int64 counts per text). `words` uint32 [M] are the texts
    joined, `lengths` [N] their words. A text of fewer than n words has one n-gram, made of all of them."""
    lengths = np.asarray(lengths, np.int64)
    counts = np.maximum(lengths - n + 1, np.minimum(lengths, 1))
    inside = within(counts)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + inside
    left = np.repeat(lengths, counts) - inside  # words from there to the end of the text
    out = np.zeros(len(starts), np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            here = np.minimum(starts + k, max(len(words) - 1, 0))
            word = np.where(k < left, words[here].astype(np.uint64) + np.uint64(1), np.uint64(0))
            out = (out ^ word) * _P[k % 3]
            out ^= out >> np.uint64(29)
    return _finish(out), counts


def signatures(words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint32 [N, PERMUTATIONS]: for each text and each of 64 hash functions the least value over its 3-grams (Broder 1997); the
    share of equal places estimates the Jaccard similarity of two texts' sets of 3-grams. Every text has at least one word."""
    hashes, counts = shingles(words, lengths)
    out = np.empty((len(counts), PERMUTATIONS), np.uint32)
    if not len(counts):
        return out
    starts = np.cumsum(counts) - counts
    with np.errstate(over="ignore"):
        for k in range(PERMUTATIONS):  # multiply-shift: the upper half of a * h + b with a odd
            values = ((hashes * _A[k] + _B[k]) >> np.uint64(32)).astype(np.uint32)
            out[:, k] = np.minimum.reduceat(values, starts)
    return out


def repetitions(words: np.ndarray, lengths: np.ndarray, n: int = 4) -> np.ndarray:
    """float64 [N]: share of the n-grams of a text that stand in it before; 0 for texts under 50 words, whose n-grams say little."""
    hashes, counts = shingles(words, lengths, n)
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    again = np.r_[False, (hashes[1:] == hashes[:-1]) & (owner[1:] == owner[:-1])] if len(hashes) else np.zeros(0, bool)
    repeated = np.bincount(owner[again], minlength=len(counts))
    return np.where(np.asarray(lengths) >= 50, repeated / np.maximum(counts, 1), 0.0)


def within(counts: np.ndarray) -> np.ndarray:
    """int64: 0, 1, … for each text anew."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def distinct(values: np.ndarray) -> np.ndarray:
    """Ascending. By sorting: np.unique of numpy 2.4 hashes first, five times slower where most values differ (seen)."""
    values = np.sort(values)
    return values[np.r_[True, values[1:] != values[:-1]]] if len(values) else values


def _finish(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


_A = _finish(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64) * _P[0]) | np.uint64(1)
_B = _finish(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64) * _P[1])
