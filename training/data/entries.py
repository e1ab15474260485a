"""Entries of the data cache: folders named by their content, written beside and renamed, so that they are whole or not there.

A lock file keeps a second process from doing the same work; where the file system knows no locks the work is done
twice and one result stays, because the rename is what makes it right. Left out: what is in an entry, apart from the
`meta.json` that is written last, and what goes into its key.
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
from pathlib import Path
from typing import IO, Any, TypeVar

from ...launcher.errors import DataError

T = TypeVar("T")


def build(
    cache: Path, key: str, opened: Callable[[Path], T | None], fill: Callable[[Path], dict[str, Any]]
) -> tuple[T, bool]:
    """(the entry, whether this call made it). `opened` reads a folder, None when it is not a whole entry; `fill` writes
    the files into a folder and returns what meta.json is to hold. What `fill` raises goes through, and nothing stays
    behind. Raises DataError when the cache cannot be written."""
    if (found := opened(cache / key)) is not None:
        return found, False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if (found := opened(cache / key)) is not None:  # another process made it while we waited
                return found, False
            _remove_abandoned(cache)
            _make(cache / key, opened, fill)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{cache}: no space left for the tokenized data, which takes 5 bytes a token, about as much as the "
                f"text. Free some, or put the cache elsewhere."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{cache}: the data cache cannot be written: {error.strerror}.") from None
        raise
    found = opened(cache / key)
    assert found is not None, f"{cache / key} was just written"
    return found, True


def read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta


def remove(folder: Path) -> None:
    """An entry that is no longer needed, if there is one; a process that reads it keeps what it has mapped."""
    with contextlib.suppress(OSError):
        gone = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:12]}")
        os.rename(folder, gone)
        shutil.rmtree(gone)


def synced(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make(target: Path, opened: Callable[[Path], object], fill: Callable[[Path], dict[str, Any]]) -> None:
    beside = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    beside.mkdir()
    try:
        meta = fill(beside)
        with (beside / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            synced(file)
        _into_place(beside, target, opened)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _into_place(beside: Path, target: Path, opened: Callable[[Path], object]) -> None:
    """Renames; an entry that stands there already was made by another process (kept) or is damaged (replaced)."""
    for _ in range(2):
        try:
            os.rename(beside, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if opened(target) is not None:
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
