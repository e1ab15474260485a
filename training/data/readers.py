"""Rows of JSON, JSON lines, CSV and Parquet files, each with the number a user finds it under.

JSON and CSV are read with the standard library because no faster reader says on which line a row begins. A row that
cannot be read is yielded as a RowError and reading goes on, so that all of them can be counted; only a file that is
not what its name says raises.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from ...launcher.errors import DataError


class RowError(ValueError):
    """What is wrong with one row, without its place."""


LARGEST_BYTES = 40_000_000  # of a line; four bytes for each of the characters that a row may have (`samples.py`)
_ESCAPED = re.compile("[\udc80-\udcff]")

Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any] | RowError]]]


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """One object a line; blank lines are skipped, and the number is the line's."""
    with path.open("rb") as file:
        _refuse_utf16(file, path)
        for number, raw in enumerate(file, start=1):
            if raw := (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip():
                yield number, _object(raw)


def _object(raw: bytes) -> dict[str, Any] | RowError:
    if len(raw) > LARGEST_BYTES:
        return RowError(f"the row has {len(raw) / 1e6:.1f} MB; {LARGEST_BYTES / 1e6:.0f} are the most, split it")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text (byte 0x{raw[error.start]:02x} at position {error.start + 1})")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("not JSON: nested too deeply")
    return value if isinstance(value, dict) else RowError(f"not a JSON object but {_kind(value)}")


def _json_file(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """An array of objects, or objects one after another; the number is the line on which the object begins."""
    with path.open("rb") as file:
        _refuse_utf16(file, path)
        raw = file.read()
    text = raw.decode("utf-8-sig", errors="surrogateescape")  # bytes that are not UTF-8 spoil one row
    decoder, at, line, counted, rows = json.JSONDecoder(), _skip(text, 0), 1, 0, 0
    array = text[at : at + 1] == "["
    at = _skip(text, at + 1) if array else at
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            begin = at
            value, at = decoder.raw_decode(text, at)
            wrong = _undecoded(text, begin, at)
            at = _skip(text, at)
            if array and at < len(text) and text[at] not in ",]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:  # where the next object begins cannot be known
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
        rows += 1
        if wrong:
            yield line, RowError(wrong)
        else:
            yield line, value if isinstance(value, dict) else RowError(f"not a JSON object but {_kind(value)}")
        if array and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    if array and at >= len(text):
        raise DataError(f"{path}: the array is not closed; the file seems to be cut off after {rows} rows.")


def _undecoded(text: str, start: int = 0, stop: int = sys.maxsize) -> str | None:
    """What is wrong with text that was decoded with surrogateescape; None when it was all UTF-8."""
    found = _ESCAPED.search(text, start, stop)
    return f"not UTF-8 text (byte 0x{ord(found[0]) - 0xDC00:02x})" if found else None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """A header line, then one row a record; the number is the line on which the record begins."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open("rb") as probe:
        _refuse_utf16(probe, path)
    with path.open(
        encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:  # bytes that are not UTF-8 spoil one row
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        begins = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}, line {begins}: not CSV: {error}.") from None
            if cells is None:
                return
            if header is None:
                header = cells
                if wrong := _undecoded("".join(cells)):
                    raise DataError(f"{path}, line {begins}: the header is {wrong}; save the file as UTF-8.")
            elif wrong := _undecoded("".join(cells)):
                yield begins, RowError(wrong)
            elif cells and len(cells) != len(header):
                yield begins, RowError(f"{len(cells)} fields where the header has {len(header)}")
            elif cells:
                yield begins, dict(zip(header, cells, strict=True))
            begins = reader.line_num + 1


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Rows counted from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise DataError(f"{path}: not a whole Parquet file (read {number} rows, then: {reason}).") from None


def _refuse_utf16(file: IO[bytes], path: Path) -> None:
    head = file.read(2)
    file.seek(0)
    if head in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8.")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "something else")


READERS: dict[str, tuple[Literal["line", "row"], Reader]] = {
    ".jsonl": ("line", _json_lines),
    ".ndjson": ("line", _json_lines),
    ".json": ("line", _json_file),
    ".csv": ("line", _csv),
    ".tsv": ("line", _csv),
    ".parquet": ("row", _parquet),
}
