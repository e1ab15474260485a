"""Which rows make up the global batch of a step, and which of them a rank gets: functions of (seed, step) alone.

Neither depends on the world size, so a run resumed on another number of GPUs goes on with the same batches. Left out:
the rows themselves (`packing.py`) and their tensors (`collate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .packing import permutation


@dataclass(frozen=True, kw_only=True)
class Order:
    """An endless stream of per-epoch permutations of `n_rows` rows, cut into global batches.

    Either `epochs` (may be a fraction) or `max_steps` ends it; `max_steps` wins when both are given. Ended by epochs
    the last batch may be short; ended by steps it never is.
    """

    n_rows: int
    global_batch: int
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.n_rows < 1 or self.global_batch < 1:
            raise ValueError(f"n_rows and global_batch must be positive, not {self.n_rows} and {self.global_batch}")

    @property
    def total_rows(self) -> int:
        """Rows seen over the whole run, repeats counted."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch
        return max(1, round(self.epochs * self.n_rows))

    @property
    def steps(self) -> int:
        return math.ceil(self.total_rows / self.global_batch)

    def epoch(self, step: int) -> float:
        """Passes over the rows that are done when `step` steps are."""
        return min(step * self.global_batch, self.total_rows) / self.n_rows

    def batch(self, step: int) -> tuple[int, ...]:
        """Row indices of the global batch of `step` (counted from 0). Raises IndexError past the end."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first = step * self.global_batch
        places = range(first, min(first + self.global_batch, self.total_rows))
        return tuple(int(_epoch(self.n_rows, self.seed, i // self.n_rows)[i % self.n_rows]) for i in places)


@lru_cache(maxsize=4)
def _epoch(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(n_rows, seed, epoch)


def share(batch: Sequence[int], rank: int, world: int, micro_batch: int) -> list[tuple[int, ...]]:
    """The micro-batches of one rank: rows dealt in turn, so that all ranks together hold `batch` exactly once.

    Every rank gets the same number of micro-batches, because collectives run in each; where rows run out a
    micro-batch is empty. `collate([])` makes a row without loss of it. An evaluation batch goes the same way.
    """
    if not 0 <= rank < world or micro_batch < 1:
        raise ValueError(f"rank {rank} of {world}, micro-batch {micro_batch}")
    mine = tuple(batch[rank::world])
    most = math.ceil(len(batch) / world)
    return [mine[i : i + micro_batch] for i in range(0, max(most, 1), micro_batch)]
