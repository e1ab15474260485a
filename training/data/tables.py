"""A source of the configuration into numbered rows: which reader a path needs, and what identifies its content.

The readers of single formats are in `readers.py`; what the columns of a row mean is `layouts.py`'s business. Left
out: globs and compressed files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...launcher.errors import DataError, did_you_mean
from ...launcher.schema import Source
from .readers import READERS, RowError

Numbered = tuple[int, dict[str, Any] | RowError]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source. `rows()` starts anew on each call; a row that cannot be read comes as a RowError in its
    place."""

    name: str
    unit: Literal["line", "row"]
    files: tuple[Path, ...]
    part: str
    rows: Callable[[], Iterator[Numbered]]

    def digest(self, memo: Path) -> str:
        """Identity of the content: the bytes of the files, and which split of them."""
        total = hashlib.blake2b(self.part.encode(), digest_size=20)
        for path in self.files:
            total.update(file_digest(path, memo).encode())
        return total.hexdigest()


def open_table(source: Source) -> Table:
    """Finds what `source.path` is. Raises DataError when it is nothing that can be read."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _saved(path, source)
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in READERS:
            raise DataError(f"{source.path}: files ending in '{kind}' are not read; one of: {', '.join(READERS)}.")
        unit, reader = READERS[kind]
        return Table(name=source.path, unit=unit, files=(path,), part=kind, rows=lambda: reader(path))
    if (
        path.suffix.lower() in READERS
        or path.is_absolute()
        or source.path.count("/") > 1
        or source.path.startswith((".", "~"))
    ):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "the folder exists, the file does not" if siblings else "the folder does not exist either"
        raise DataError(f"{source.path}: no such file ({where}){did_you_mean(path.name, siblings[:1000])}")
    return _hub(source)


def _saved(path: Path, source: Source) -> Table:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; `datasets` is imported when rows are
    read."""
    folder, part = path, ""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        if source.split not in splits:
            raise DataError(f"{source.path}: holds no split '{source.split}'{did_you_mean(source.split, splits)}")
        folder, part = path / source.split, source.split
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{source.path}: a folder, but not one saved by datasets (it has no state.json or dataset_dict.json); "
            f"name the data file itself."
        )
    files = tuple(sorted(p for p in folder.iterdir() if p.suffix in (".arrow", ".json")))

    def rows() -> Iterator[Numbered]:
        import datasets

        try:
            table = datasets.load_from_disk(str(folder))
        except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged folder
            raise DataError(f"{source.path}: cannot be opened as a saved dataset: {_first_line(error)}") from error
        yield from enumerate(table, start=1)

    return Table(
        name=f"{source.path} ({part})" if part else source.path,
        unit="row",
        files=files,
        part=f"saved/{part}",
        rows=rows,
    )


def _hub(source: Source) -> Table:
    """A Hub dataset through the `datasets` library, from its cache when there is no network."""
    import datasets

    try:
        table = datasets.load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # ConnectionError, DatasetNotFoundError, ValueError for a subset or split, OSError, …
        raise DataError(
            f"{source.path}: no file or folder of that name here, and it could not be loaded from the Hub "
            f"({type(error).__name__}: {_first_line(error)}). Give the path of a file; on a machine with a network, "
            f"`hf download --repo-type dataset {source.path}` fetches the files."
        ) from error
    files = tuple(Path(entry["filename"]) for entry in table.cache_files)
    part = f"hub/{source.subset or ''}/{source.split}"
    return Table(
        name=f"{source.path} ({source.split})",
        unit="row",
        files=files,
        part=part,
        rows=lambda: enumerate(table, start=1),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_digest(path: Path, memo: Path) -> str:
    """BLAKE2 of a file's bytes, remembered under its (path, size, mtime, inode) so that a second run need not read it
    again.

    A file changed within the last two seconds is not remembered: a later write could leave the same time stamp.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    note = memo / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    if note.is_file() and len(known := note.read_text()) == 40:
        return known
    digest = hashlib.blake2b(digest_size=20)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
        with contextlib.suppress(OSError):  # only saves time; a cache that cannot be written is reported by the store
            memo.mkdir(parents=True, exist_ok=True)
            beside = note.with_suffix(f".{os.getpid()}")
            beside.write_text(digest.hexdigest())
            beside.replace(note)
    return digest.hexdigest()
