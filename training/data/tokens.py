"""A set of samples as views into memory-mapped stores: what the loop, the evaluation and the collator read.

Left out: which samples belong to the set (`selection.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .store import Store

Sample = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Sample i is stores[source[i]] from start[i] to stop[i], in tokens. `index` is its record in that store's
    samples."""

    stores: tuple[Store, ...]
    source: np.ndarray  # int32 [N]
    index: np.ndarray  # int64 [N]
    start: np.ndarray  # int64 [N]
    stop: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each sample."""
        return self.stop - self.start

    @property
    def document_lengths(self) -> np.ndarray:
        """The same as `lengths`: a sample is one document."""
        return self.lengths

    def documents(self, i: int) -> list[Sample]:
        """What the model reads for sample i."""
        return [self.sample(i)]

    def sample(self, i: int) -> Sample:
        """(ids int32 [T], mask uint8 [T]); mask[t]: token t carries loss. mask[0] is always 0. ids is a read-only
        view."""
        store, window = self.stores[self.source[i]], slice(self.start[i], self.stop[i])
        mask = np.array(store.mask[window])
        mask[0] = 0
        return np.asarray(store.ids[window]), mask

    def row(self, indices: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The samples of one packed row, as `collate` takes them."""
        return [self.sample(i) for i in indices]

    def prompt(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids, reference ids): everything before the last trained span, and that span, for generating side by
        side.

        A sample without a prompt (plain text, train_on: all) is cut in the middle.
        """
        ids, mask = self.sample(i)
        trained = np.flatnonzero(mask)
        if not len(trained) or (trained[0] <= 1 and len(trained) == len(ids) - trained[0]):
            middle = max(1, len(ids) // 2)
            return ids[:middle], ids[middle:]
        last = int(trained[-1])
        gaps = np.flatnonzero(mask[:last] == 0)
        first = int(gaps[-1]) + 1
        return ids[:first], ids[first : last + 1]

    def trained(self) -> np.ndarray:
        """int64 [N], labels that each sample contributes."""
        counts = np.concatenate([s.samples["trained"] for s in self.stores]) if self.stores else np.empty(0)
        base = np.cumsum([0, *(len(s.samples) for s in self.stores)])
        out = counts[base[self.source] + self.index].astype(np.int64)
        for i in np.flatnonzero(self.lengths != self._full_lengths()):
            out[i] = int(self.sample(int(i))[1].sum())
        return out

    def _full_lengths(self) -> np.ndarray:
        lengths = np.concatenate([s.samples["length"] for s in self.stores])
        base = np.cumsum([0, *(len(s.samples) for s in self.stores)])
        return lengths[base[self.source] + self.index]

    def select(self, keep: Sequence[int] | np.ndarray) -> TokenSet:
        """The samples at these places, in this order, repeats allowed."""
        return TokenSet(
            stores=self.stores,
            source=self.source[keep],
            index=self.index[keep],
            start=self.start[keep],
            stop=self.stop[keep],
        )
