"""Tokens of one source on disk: written beside and renamed, then memory-mapped by every rank.

    KEY/ids.bin      int32, all samples one after another, nothing cut
    KEY/mask.bin     uint8, the same length
    KEY/samples.bin  one record a sample (`SAMPLE`)
    KEY/meta.json    what was recognised and counted; written last

A lock file keeps a second process from doing the same work; where the file system knows no locks the work is done
twice and one result stays, because the rename is what makes it right. Left out: what goes into the key
(`prepare.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...launcher.errors import DataError

# `row` is the line or row number in the source; the keys identify the prompt and the whole sample (64-bit hashes). `split`: the
# sample is two, the second of which begins at that token (a rejected answer behind the chosen one); 0 where it is one. `label`: 1 or
# 0 where the row has one, else -1.
_FIELDS = {"offset": "<i8", "length": "<i4", "trained": "<i4", "row": "<i8", "prompt": "<u8", "whole": "<u8"}
SAMPLE = np.dtype([*_FIELDS.items(), ("split", "<i4"), ("label", "<i4")])


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
        self, ids: np.ndarray, mask: np.ndarray, *, row: int, keys: tuple[int, int], split: int = 0, label: int = -1
    ) -> None:
        self._ids.write(ids.astype("<i4", copy=False).tobytes())
        self._mask.write(mask.tobytes())
        record = (self.tokens, len(ids), int(mask.sum()), row, *keys, split, label)
        self._samples.write(np.array(record, dtype=SAMPLE).tobytes())
        self.samples += 1
        self.tokens += len(ids)

    def finish(self) -> None:
        for file in (self._ids, self._mask, self._samples):
            _sync(file)

    def close(self) -> None:
        for file in (self._ids, self._mask, self._samples):
            with contextlib.suppress(OSError):  # on a full disk closing flushes and fails again
                file.close()


def open_store(cache: Path, key: str) -> Store | None:
    """The entry, or None when there is none or its sizes are not what its record says."""
    folder = cache / key
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        samples = np.memmap(folder / "samples.bin", dtype=SAMPLE, mode="r")
        ids = np.memmap(folder / "ids.bin", dtype="<i4", mode="r")
        mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    if len(samples) != meta["samples"] or not len(ids) == len(mask) == meta["tokens"]:
        return None
    return Store(key=key, ids=ids, mask=mask, samples=samples, meta=meta)


def build_store(cache: Path, key: str, fill: Callable[[Writer], dict[str, Any]]) -> tuple[Store, bool]:
    """(the entry, whether this call made it). `fill` adds the samples and returns what meta.json is to hold; what it
    raises goes through, and nothing stays behind. Raises DataError when the cache cannot be written."""
    if store := open_store(cache, key):
        return store, False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if store := open_store(cache, key):  # another process made it while we waited
                return store, False
            _remove_abandoned(cache)
            _make(cache, key, fill)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{cache}: no space left for the tokenized data, which takes 5 bytes a token, about as much as the "
                f"text. Free some, or put the cache elsewhere."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{cache}: the data cache cannot be written: {error.strerror}.") from None
        raise
    store = open_store(cache, key)
    assert store is not None, f"{cache / key} was just written"
    return store, True


def _make(cache: Path, key: str, fill: Callable[[Writer], dict[str, Any]]) -> None:
    beside = cache / f"{key}.tmp-{uuid.uuid4().hex[:12]}"
    beside.mkdir()
    writer = Writer(beside)
    try:
        meta = fill(writer)
        writer.finish()
        meta |= {"samples": writer.samples, "tokens": writer.tokens}
        with (beside / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _into_place(beside, cache / key)
    finally:
        writer.close()
        shutil.rmtree(beside, ignore_errors=True)


def _into_place(beside: Path, target: Path) -> None:
    """Renames; an entry that stands there already was made by another process (kept) or is damaged (replaced)."""
    for _ in range(2):
        try:
            os.rename(beside, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if open_store(target.parent, target.name):
                return
            shutil.rmtree(target, ignore_errors=True)
    raise OSError(errno.EEXIST, "an entry of the data cache cannot be replaced", str(target))


def _remove_abandoned(cache: Path) -> None:
    """Folders of processes that were killed while writing; a day is longer than any of them takes."""
    for folder in cache.glob("*.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 86_400:
                shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Some cluster file systems (Lustre without -o flock) know no locks: see the note at the top.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
