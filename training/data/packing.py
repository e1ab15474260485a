"""Several samples into one row: best fit decreasing, on lengths alone.

Which samples share a row is decided here; that they cannot see each other is the collator's and the model's business.
Left out: cutting a sample to fill a row. A sample is never split, so the loss of a packed row is the loss of its
samples alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rows = tuple[tuple[int, ...], ...]


def pack(lengths: Sequence[int] | np.ndarray, max_length: int, seed: int, *, packing: bool = True) -> Rows:
    """Rows of sample indices, each of at most `max_length` tokens; every index stands in exactly one row.

    Best fit decreasing (Johnson 1974): the longest sample first, each into the fullest row that still takes it. The
    free spaces are the bits of one integer, so the best fit is its lowest set bit at or above the length. The rows
    come out longest sample first and are therefore shuffled; the result is a function of (lengths, max_length, seed).
    `packing=False`: one sample a row, in the order given. Raises ValueError for a length outside 1..max_length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() <= max_length):
        raise ValueError(f"lengths must lie in 1..{max_length}, found {sizes.min()}..{sizes.max()}")
    if not packing:
        return tuple((i,) for i in range(len(sizes)))
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(max_length + 1)]  # free tokens -> rows with exactly that many
    free = 0  # bit s is set when with_space[s] is not empty
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fits = free >> size
        if fits:
            space = size + (fits & -fits).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                free ^= 1 << space
            rows[row].append(index)
        else:
            space, row = max_length, len(rows)
            rows.append([index])
        left = space - size
        if left:
            with_space[left].append(row)
            free |= 1 << left
    return tuple(tuple(rows[i]) for i in permutation(len(rows), seed, 0))


def permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on (n, seed, stream) alone.

    Drawn by sorting raw 64-bit words, because NumPy promises the stream of a bit generator across versions but not what
    `Generator.permutation` makes of it (NEP 19), and a run may be resumed under another NumPy.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(n)
    return np.argsort(words, kind="stable")
