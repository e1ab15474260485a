"""Tokens of one source on disk, an entry of the cache (`entries.py`), memory-mapped by every rank.

    KEY/ids.bin      int32, all samples one after another, nothing cut
    KEY/mask.bin     uint8, the same length
    KEY/samples.bin  one record a sample (`SAMPLE`)
    KEY/meta.json    what was recognised and counted; written last

Left out: what goes into the key (`intake.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import entries

# `row` is the line or row number in the source, `place` counts its rows from 0, good or bad; the keys identify the prompt and the
# whole sample (64-bit hashes). `split`: the sample is two, the second of which begins at that token (a rejected answer behind the chosen
# one); 0 where it is one. `label`: 1 or 0 where the row has one, else -1.
_FIELDS = {
    "offset": "<i8",
    "length": "<i4",
    "trained": "<i4",
    "row": "<i8",
    "place": "<i8",
    "prompt": "<u8",
    "whole": "<u8",
}
SAMPLE = np.dtype([*_FIELDS.items(), ("split", "<i4"), ("label", "<i4")])
_PIECE = 1 << 22  # tokens copied at a time


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open entry: `ids` and `mask` are memory maps, `samples` an array of SAMPLE."""

    key: str
    ids: np.ndarray
    mask: np.ndarray
    samples: np.ndarray
    meta: dict[str, Any]


class Writer:
    """Appends samples to the two files of an entry that is being made."""

    def __init__(self, folder: Path):
        self._ids: IO[bytes] = (folder / "ids.bin").open("wb")
        self._mask: IO[bytes] = (folder / "mask.bin").open("wb")
        self._samples: IO[bytes] = (folder / "samples.bin").open("wb")
        self.samples = self.tokens = 0

    def add(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        *,
        row: int,
        place: int,
        keys: tuple[int, int],
        split: int = 0,
        label: int = -1,
    ) -> None:
        self._ids.write(ids.astype("<i4", copy=False).tobytes())
        self._mask.write(mask.tobytes())
        record = (self.tokens, len(ids), int(mask.sum()), row, place, *keys, split, label)
        self._samples.write(np.array(record, dtype=SAMPLE).tobytes())
        self.samples += 1
        self.tokens += len(ids)

    def append(self, part: Store) -> None:
        """All samples of another store."""
        samples = np.array(part.samples)
        samples["offset"] += self.tokens
        self._samples.write(samples.tobytes())
        for at in range(0, len(part.ids), _PIECE):
            self._ids.write(part.ids[at : at + _PIECE].tobytes())
            self._mask.write(part.mask[at : at + _PIECE].tobytes())
        self.samples += len(samples)
        self.tokens += len(part.ids)

    def finish(self) -> None:
        for file in (self._ids, self._mask, self._samples):
            entries.synced(file)

    def close(self) -> None:
        for file in (self._ids, self._mask, self._samples):
            with contextlib.suppress(OSError):  # on a full disk closing flushes and fails again
                file.close()


def open_store(cache: Path, key: str) -> Store | None:
    """The entry, or None when there is none or its sizes are not what its record says."""
    folder = cache / key
    if (meta := entries.read_meta(folder)) is None:
        return None
    try:
        samples = _mapped(folder / "samples.bin", SAMPLE)
        ids = _mapped(folder / "ids.bin", np.dtype("<i4"))
        mask = _mapped(folder / "mask.bin", np.dtype(np.uint8))
    except (OSError, ValueError):
        return None
    if len(samples) != meta["samples"] or not len(ids) == len(mask) == meta["tokens"]:
        return None
    return Store(key=key, ids=ids, mask=mask, samples=samples, meta=meta)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """An empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def build_store(cache: Path, key: str, fill: Callable[[Writer], dict[str, Any]]) -> tuple[Store, bool]:
    """(the entry, whether this call made it). `fill` adds the samples and returns what meta.json is to hold; what it
    raises goes through, and nothing stays behind. Raises DataError when the cache cannot be written."""

    def write(folder: Path) -> dict[str, Any]:
        writer = Writer(folder)
        try:
            meta = fill(writer)
            writer.finish()
            return meta | {"samples": writer.samples, "tokens": writer.tokens}
        finally:
            writer.close()

    return entries.build(cache, key, lambda folder: open_store(folder.parent, folder.name), write)
