"""Which samples train and which are held out: split, leaks, weights, and the cut at `max_length`.

All of it is arithmetic on the records of stores that are tokenized already, so another seed, weight, split or length
costs no tokenizing. Everything is a function of (samples, seed). Left out: near-duplicates (`curate/`);
only equal prompts and equal samples are seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...launcher.errors import DataError
from .store import Store
from .tokens import TokenSet


def whole(stores: Sequence[Store]) -> TokenSet:
    """Every sample of the stores, uncut."""
    counts = [len(s.samples) for s in stores]
    start = np.concatenate([s.samples["offset"] for s in stores])
    return TokenSet(
        stores=tuple(stores),
        source=np.repeat(np.arange(len(stores), dtype=np.int32), counts),
        index=np.concatenate([np.arange(n, dtype=np.int64) for n in counts]),
        start=start,
        stop=start + np.concatenate([s.samples["length"] for s in stores]),
    )


def field(samples: TokenSet, name: str) -> np.ndarray:
    """One field of the records of all samples of the set."""
    out = np.empty(len(samples), dtype=samples.stores[0].samples.dtype[name])
    for number, store in enumerate(samples.stores):
        mine = samples.source == number
        out[mine] = store.samples[name][samples.index[mine]]
    return out


def hold_out(samples: TokenSet, share: float, seed: int) -> tuple[TokenSet, TokenSet]:
    """(train, eval): about `share` of the samples; equal prompts stay on one side. Raises DataError as `drawn` does."""
    held = drawn(field(samples, "prompt"), share, seed, "equal prompts")
    return samples.select(np.flatnonzero(~held)), samples.select(np.flatnonzero(held))


def drawn(groups: np.ndarray, share: float, seed: int, what: str) -> np.ndarray:
    """bool [N]: about `share` of the samples, at least one, chosen by a hash of group and seed; a group stays on one side. `groups`
    are 64-bit keys, `what` says in an error which samples share one.

    Groups are taken in the order of their hash as long as they fit, so that adding rows moves few
    others; if none fits, the first of the smallest. Raises DataError when that would be more than half.
    """
    unique, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = max(1, round(share * len(groups)))
    order = np.argsort(mix(unique, seed), kind="stable")
    taken = np.zeros(len(unique), bool)
    count = 0
    for g in order:
        if count + size[g] <= wanted and count + size[g] < len(groups):
            taken[g] = True
            count += size[g]
            if count == wanted:
                break
    if count == 0:
        smallest = order[np.argmin(size[order])] if len(groups) else 0
        if not len(groups) or 2 * size[smallest] > len(groups):
            raise DataError(
                f"data.eval: {share:g} of {len(groups)} samples cannot be held out: {what} stay on one side, "
                f"and there is only {len(unique)} of them. Set data.eval to a file of its own, or to 0."
            )
        taken[smallest] = True
    held: np.ndarray = taken[group]
    return held


def decided(samples: TokenSet, places: Sequence[np.ndarray]) -> TokenSet:
    """The samples of source k whose places in it are in places[k], for all k."""
    place = field(samples, "place")
    keep = np.zeros(len(samples), bool)
    for number, wanted in enumerate(places):
        mine = samples.source == number
        keep[mine] = np.isin(place[mine], wanted)
    return samples.select(np.flatnonzero(keep))


def joined(one: TokenSet, other: TokenSet) -> TokenSet:
    """Two sets of the same stores as one, in the order of the sources."""
    both = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])
        for name in ("source", "index", "start", "stop")
    }
    whole = TokenSet(stores=one.stores, **both)
    return whole.select(np.lexsort((whole.index, whole.source)))


def remove_leaks(train: TokenSet, evaluation: TokenSet) -> tuple[TokenSet, int, int]:
    """(train without the samples that stand in eval too, how many were removed, how many of the rest share a prompt
    with eval)."""
    same = np.isin(field(train, "whole"), field(evaluation, "whole"))
    rest = train.select(np.flatnonzero(~same))
    shared = np.isin(field(rest, "prompt"), field(evaluation, "prompt"))
    return rest, int(same.sum()), int(shared.sum())


def weigh(samples: TokenSet, weights: Sequence[float], seed: int) -> TokenSet:
    """Each source `weights[k]` times: whole copies, and for the fraction a random part that depends on (seed, sample)
    alone."""
    if all(weight == 1 for weight in weights):
        return samples
    draw = mix(field(samples, "whole") ^ field(samples, "row").astype(np.uint64), seed)
    keep = []
    for number, weight in enumerate(weights):
        mine = np.flatnonzero(samples.source == number)
        extra = round((weight - int(weight)) * len(mine))
        chosen = mine[np.argsort(draw[mine], kind="stable")[:extra]]
        keep.append(np.sort(np.concatenate([*[mine] * int(weight), chosen])))
    return samples.select(np.concatenate(keep))


def cut(samples: TokenSet, max_length: int) -> tuple[TokenSet, int, int]:
    """(samples of at most max_length tokens, how many were cut on the right, how many dropped as nothing trained was
    left)."""
    long = samples.lengths > max_length
    short = TokenSet(
        stores=samples.stores,
        source=samples.source,
        index=samples.index,
        start=samples.start,
        stop=np.minimum(samples.stop, samples.start + max_length),
    )
    lost = np.array([i for i in np.flatnonzero(long) if not short.sample(int(i))[1].any()], dtype=np.int64)
    keep = np.setdiff1d(np.arange(len(short)), lost)
    return short.select(keep), int(long.sum()), len(lost)


def split_documents(samples: TokenSet, max_length: int) -> tuple[TokenSet, int]:
    """(pieces of at most max_length tokens, how many documents were cut into several). Nothing is lost: a piece
    begins with the last token of the one before it, so that every token but a document's first is predicted exactly
    once."""
    lengths, step = samples.lengths, max_length - 1
    pieces = np.maximum(1, -(-(lengths - 1) // step))
    owner = np.repeat(np.arange(len(samples)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = samples.start[owner] + number * step
    out = TokenSet(
        stores=samples.stores,
        source=samples.source[owner],
        index=samples.index[owner],
        start=start,
        stop=np.minimum(samples.stop[owner], start + max_length),
    )
    return out, int((pieces > 1).sum())


def mix(keys: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) of uint64 keys and a seed: uniform, the same on every
    machine."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
