"""What curation knows of each row of a source, on disk: made in one pass over the rows, memory-mapped afterwards.

    KEY/rows.bin        one record a row (`ROW`)
    KEY/words.bin       uint32, the numbered words of all rows that passed the filters (`words.py`)
    KEY/signatures.bin  uint32 [rows, 64]
    KEY/meta.json       reasons and balanced values by number, counts

An entry of a block of rows has the same form, so that a source is its blocks one after another (`samples.py`). Left out: what is
decided from it (`decide.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..entries import read_meta, synced
from .words import PERMUTATIONS

# `place` and `row` as in `samples.py` (place, number); `prompt` and `text` are 64-bit hashes of the prompt and of the whole text, white
# space aside. `reason` and `value` count into the lists of meta.json; -1: no filter objects, no value. `label` as in a token store.
ROW = np.dtype(
    [
        ("place", "<i8"),
        ("row", "<i8"),
        ("prompt", "<u8"),
        ("text", "<u8"),
        ("offset", "<i8"),
        ("count", "<i4"),
        ("reason", "<i2"),
        ("value", "<i4"),
        ("label", "<i2"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """An open entry; the arrays are memory maps."""

    rows: np.ndarray  # ROW [N]
    words: np.ndarray  # uint32 [M]
    signatures: np.ndarray  # uint32 [N, 64]
    meta: dict[str, Any]


def open_sheet(folder: Path) -> Sheet | None:
    """None when there is none, or its sizes are not what its record says."""
    if (meta := read_meta(folder)) is None:
        return None
    try:
        rows = _mapped(folder / "rows.bin", ROW)
        words = _mapped(folder / "words.bin", np.dtype("<u4"))
        signatures = _mapped(folder / "signatures.bin", np.dtype("<u4"))
    except (OSError, ValueError):
        return None
    if len(rows) != meta["kept"] or len(words) != meta["words"] or signatures.size != len(rows) * PERMUTATIONS:
        return None
    return Sheet(rows=rows, words=words, signatures=signatures.reshape(-1, PERMUTATIONS), meta=meta)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """An empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class SheetWriter:
    """Appends rows to the files of an entry that is being made."""

    def __init__(self, folder: Path):
        self._files = [(folder / name).open("wb") for name in ("rows.bin", "words.bin", "signatures.bin")]
        self._reasons: dict[str, int] = {}
        self._values: dict[str, int] = {}
        self.rows = self.words = 0

    def add(
        self, rows: np.ndarray, words: np.ndarray, signatures: np.ndarray, reasons: Sequence[str], values: Sequence[str]
    ) -> None:
        """`rows` count offset, reason and value from 0, 0 and 0 within this call; here they are moved to where they are."""
        rows = rows.copy()
        rows["offset"] += self.words
        for field, names, known in (("reason", reasons, self._reasons), ("value", values, self._values)):
            places = np.array([*(known.setdefault(name, len(known)) for name in names), -1], np.int64)
            rows[field] = places[rows[field]]  # -1 is the last of them
        for file, array in zip(self._files, (rows, words.astype("<u4"), signatures.astype("<u4")), strict=True):
            file.write(np.ascontiguousarray(array).tobytes())
        self.rows += len(rows)
        self.words += len(words)

    def append(self, part: Sheet) -> None:
        """The rows of a block that was made before, a piece at a time."""
        step = 100_000
        for at in range(0, len(part.rows), step):
            rows = np.array(part.rows[at : at + step])
            first = int(rows["offset"][0])
            last = int(rows["offset"][-1]) + int(rows["count"][-1])
            rows["offset"] -= first
            meta = part.meta
            self.add(rows, part.words[first:last], part.signatures[at : at + step], meta["reasons"], meta["values"])

    def finish(self) -> dict[str, Any]:
        """What meta.json holds of the files."""
        for file in self._files:
            synced(file)
        self.close()
        return {"kept": self.rows, "words": self.words, "reasons": list(self._reasons), "values": list(self._values)}

    def close(self) -> None:
        for file in self._files:
            file.close()
