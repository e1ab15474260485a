"""The rows of one source as samples, in blocks, with what is wrong with each row that is none.

A block is 20,000 rows of a source, good or bad, so that the blocks of a file are the same for
everyone: `data prepare --shards N --shard I` makes every Nth of them. Left out: what is made of the samples (`intake.py`,
`curate/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from typing import Any

from ...launcher.errors import DataError
from ...launcher.schema import Source
from . import layouts, preferences
from .preferences import Anything, Pair, parts
from .readers import RowError
from .tables import Numbered, Table
from .turns import Chat

BLOCK = 20_000
CHUNK = 1000  # rows tokenized in one call: 256 and 4,000 took the same CPU time per row (SmolLM2's tokenizer, 2 cores)
LARGEST = 10_000_000  # characters of a row: tokenizing takes about 100 bytes of memory for each
_SHOWN = 3  # bad rows spelled out in an error
_LISTED = 10_000  # bad rows kept by number and reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """`place` counts the rows of the source from 0, good or bad (twice, for pairs that are read as two labelled answers); `number` is
    the line or row to tell a user; `row` has the columns under our names, `keys` are the hashes of the prompt and of the whole."""

    place: int
    number: int
    row: dict[str, Any]
    example: Anything
    keys: tuple[int, int]


@dataclass(kw_only=True)
class BadRows:
    """All of them counted, the first ten thousand with number and reason."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, error: RowError | str) -> None:
        self.count += 1
        if len(self.first) < _LISTED:
            self.first.append((number, str(error)))

    def merge(self, count: int, first: Sequence[Sequence[Any]]) -> None:
        self.count += count
        self.first = [*self.first, *((int(n), str(why)) for n, why in first)][:_LISTED]


def refuse(bad: BadRows, rows: int, table: Table) -> None:
    """Raises DataError, with the first three, if there are any."""
    shown = [f"{table.unit} {number}: {why}" for number, why in sorted(bad.first)[:_SHOWN]]
    if bad.count == 1:
        raise DataError(f"{table.name}, {shown[0]}. It is the only bad row of {rows:,}; mend or remove it.")
    if bad.count:
        more = f"; and {bad.count - _SHOWN:,} more" if bad.count > _SHOWN else ""
        raise DataError(
            f"{table.name}: {bad.count:,} of {rows:,} rows are bad; mend or remove them, or leave them out with "
            f"--skip-bad-rows. {'; '.join(shown)}{more}."
        )


class Block:
    """Rows that are read once: `chunks()` gives the samples and counts the others. `rows` and `bad` are complete
    afterwards."""

    def __init__(self, number: int, numbered: Iterator[tuple[int, Numbered]], owner: Samples):
        self.number, self.rows, self.bad = number, 0, BadRows()
        self._numbered, self._owner = numbered, owner

    def chunks(self) -> Iterator[list[Sample]]:
        while chunk := list(islice(self._numbered, CHUNK)):
            self.rows += len(chunk)
            yield [sample for place, (number, row) in chunk for sample in self._samples(place, number, row)]

    def _samples(self, place: int, number: int, row: dict[str, Any] | RowError) -> list[Sample]:
        try:
            if isinstance(row, RowError):
                raise row
            named = layouts.rename(row, self._owner.source.columns)
            example = self._owner.convert(named)
            sides: Sequence[tuple[dict[str, Any], Anything]] = [(named, example)]
            if self._owner.kind == "kto" and isinstance(example, Pair):
                sides = preferences.unpaired(named, example)
            return [
                Sample(place=place * len(sides) + k, number=number, row=row, example=side, keys=side.keys())
                for k, (row, side) in enumerate(sides)
            ]
        except RowError as error:
            self.bad.add(number, error)
        except UnicodeEncodeError:  # from the keys, which are the first to encode the text
            self.bad.add(number, "holds half of a surrogate pair, which is not Unicode text")
        return []


class Samples:
    """One source, its layout recognised. `kind` is what the objective reads: sft, pretrain, preference or kto."""

    def __init__(self, table: Table, source: Source, *, kind: str, roles: tuple[str, ...]):
        layouts.check_columns(source.columns, source.path)
        self.table, self.source, self.kind, self.roles = table, source, kind, roles

    @cached_property
    def layout(self) -> str | None:
        """From the first row that can be read at all."""
        first = next((row for _, row in self.table.rows() if isinstance(row, dict)), None)
        return None if first is None else self._recognise(first)

    def blocks(self) -> Iterator[Block]:
        """Each must be used before the next is taken."""
        for number, rows in groupby(enumerate(self.table.rows()), key=lambda placed: placed[0] // BLOCK):
            yield Block(number, rows, self)

    def convert(self, row: dict[str, Any]) -> Anything:
        """One row, columns renamed. Raises RowError."""
        assert self.layout is not None  # or every row is a RowError
        example: Anything
        if self.layout == "preference" or self.layout.startswith("kto/"):
            example = preferences.convert(row, self.layout)
        else:
            example = layouts.convert(row, self.layout)
        if isinstance(example, Chat):
            example = replace(example, roles=self.roles)
        size = 0
        for part in parts(example):
            if isinstance(part, Chat):
                part.check()
                systems = [
                    i for i, message in enumerate(part.messages, start=1) if message["role"] in ("system", "developer")
                ]
                if len(systems) > 1:
                    raise RowError(f"message {systems[1]} is a second system prompt")
                size += sum(len(message["content"]) for message in part.messages)
            else:
                size += len(part.prompt) + len(part.completion)
        if size > LARGEST:
            raise RowError(f"holds {size / 1e6:.1f} million characters; {LARGEST / 1e6:.0f} are the most, split it")
        return example

    def _recognise(self, first: dict[str, Any]) -> str:
        columns = self.source.columns
        if missing := [theirs for theirs in columns.values() if theirs not in first]:
            found = ", ".join(sorted(first)) or "none"
            raise DataError(
                f"{self.table.name}: data columns: no column {missing[0]} in the first row, found: {found}."
            )
        names = layouts.rename(first, columns).keys()
        if self.kind in ("preference", "kto"):
            return preferences.recognise(names, self.source.format, self.kind, self.table.name)
        return layouts.recognise(names, self.source.format, kind=self.kind, source=self.table.name)
