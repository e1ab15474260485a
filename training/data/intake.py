"""One source at a time: read, recognised, rendered, tokenized, checked, into a cache entry of its own.

The key of an entry is made of everything that decides its bytes: the content of the files, how their columns are
read, the template, the tokenizer, which tokens are trained, the code of this folder and the versions of the two
libraries. Left out: everything that can be decided afterwards (split, weights, length, seed).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ...launcher.errors import DataError
from ...launcher.schema import Source
from . import preferences, preflight
from .encoding import Encoded, Encoder, joined
from .layouts import check_columns, convert, recognise, rename
from .preferences import Anything, parts
from .readers import RowError
from .rendering import Renderer
from .report import SourceReport
from .store import Store, Writer, build_store
from .tables import Numbered, Table, open_table
from .turns import Chat

_CHUNK = 1000  # rows tokenized in one call: 256 and 4,000 took the same CPU time per row (SmolLM2's tokenizer, 2 cores)
_SHOWN = 3  # bad rows spelled out in an error


class Intake:
    """Turns sources into stores, and keeps a report of each. `cached` stays True as long as nothing had to be
    made."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        tokenizer_id: str,
        renderer: Renderer | None,
        train_on: str | tuple[str, ...],
        kind: str,
        cache: Path,
    ):
        self.tokenizer, self.tokenizer_id, self.renderer = tokenizer, tokenizer_id, renderer
        self.train_on, self.kind, self.cache = train_on, kind, cache
        self.reports: list[SourceReport] = []
        self.cached = True
        self.template: Renderer | None = None  # the renderer, once some source needed it
        self._identity = (
            code_version(),
            _tokenizer_content(tokenizer),
            renderer.template if renderer else None,
            (train_on, kind),
            (version("tokenizers"), version("transformers")),
        )

    def store(self, source: Source, used_for: str) -> Store:
        """Raises DataError for whatever is wrong with the source. A source with a bad row leaves no entry; one whose
        masks are at fault does, and is refused again from its record."""
        check_columns(source.columns, source.path)
        table = open_table(source)
        key = digest(self._identity, table.digest(self.cache / "files"), source.format, dict(source.columns))
        store, made = build_store(self.cache, key, lambda writer: self._fill(writer, table, source))
        self.cached &= not made
        meta = store.meta
        renderer = self.renderer if meta["chats"] else None
        self.template = self.template or renderer
        preflight.check_store(store, table.name, table.unit, renderer.origin if renderer else None, self.tokenizer)
        self.reports.append(
            SourceReport(
                path=table.name,
                used_for=used_for,
                layout=meta["layout"],
                rows=meta["rows"],
                tokens=meta["tokens"],
                weight=source.weight,
                spans=meta["spans"],
                fingerprint=key,
            )
        )
        return store

    def _fill(self, writer: Writer, table: Table, source: Source) -> dict[str, Any]:
        """Tokenizes all rows; returns what the entry's record holds."""
        encoder = Encoder(self.tokenizer, self.tokenizer_id, self.renderer, train_on=self.train_on)
        bad = _BadRows(table)
        faults: preflight.Faults = {}
        spans: Counter[str] = Counter()
        layout: str | None = None
        rows = chats = 0
        numbered = table.rows()
        while chunk := list(islice(numbered, _CHUNK)):
            rows += len(chunk)
            layout = layout or self._layout(chunk, source, table)
            examples = list(_examples(chunk, layout, source, bad, encoder.roles))
            results = iter(encoder.encode([part for _, example, _ in examples for part in parts(example)]))
            for number, example, keys in examples:
                sides = list(zip(parts(example), islice(results, len(parts(example))), strict=True))
                if wrong := next((found for _, found in sides if isinstance(found, RowError)), None):
                    bad.add(number, wrong)
                    continue
                for side, encoded in sides:
                    assert isinstance(encoded, Encoded)  # the others went to `bad`
                    if not spans:
                        encoder.check_agreement(side, encoded)
                    preflight.note_faults(faults, number, side, encoded, encoder)
                    spans[encoded.method] += 1
                    chats += isinstance(side, Chat)
                writer.add(
                    **joined([found for _, found in sides if isinstance(found, Encoded)], example),
                    row=number,
                    keys=keys,
                )
        bad.raise_if_any(rows)
        preflight.check_empty(rows, table.name, ": it holds no rows")
        return {"layout": layout, "rows": rows, "chats": chats, "spans": dict(spans), "faults": faults}

    def _layout(self, chunk: Sequence[Numbered], source: Source, table: Table) -> str | None:
        """From the first row of the chunk that could be read at all."""
        first = next((row for _, row in chunk if isinstance(row, dict)), None)
        if first is None:
            return None
        if missing := [theirs for theirs in source.columns.values() if theirs not in first]:
            found = ", ".join(sorted(first)) or "none"
            raise DataError(f"{table.name}: data columns: no column {missing[0]} in the first row, found: {found}.")
        columns = rename(first, source.columns).keys()
        if self.kind in ("preference", "kto"):
            return preferences.recognise(columns, source.format, self.kind, table.name)
        return recognise(columns, source.format, kind=self.kind, source=table.name)


def _examples(
    chunk: Sequence[Numbered], layout: str | None, source: Source, bad: _BadRows, roles: tuple[str, ...]
) -> Iterator[tuple[int, Anything, tuple[int, int]]]:
    """(number, sample, its keys) of the rows that are good; the others go to `bad`."""
    for number, row in chunk:
        try:
            if isinstance(row, RowError):
                raise row
            assert layout is not None  # the first row that is a dict has decided it
            example: Anything
            if layout == "preference" or layout.startswith("kto/"):
                example = preferences.convert(rename(row, source.columns), layout)
            else:
                example = convert(rename(row, source.columns), layout)
            if isinstance(example, Chat):
                example = replace(example, roles=roles)
            for part in parts(example):
                if isinstance(part, Chat):
                    part.check()
            yield number, example, example.keys()
        except RowError as error:
            bad.add(number, error)
        except UnicodeEncodeError:  # from the keys, which are the first to encode the text
            bad.add(number, RowError("holds half of a surrogate pair, which is not Unicode text"))


class _BadRows:
    """Counts all bad rows and keeps the first few."""

    def __init__(self, table: Table):
        self._table = table
        self._first: list[str] = []
        self._count = 0

    def add(self, number: int, error: RowError) -> None:
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{self._table.unit} {number}: {error}")

    def raise_if_any(self, rows: int) -> None:
        name = self._table.name
        if self._count == 1:
            raise DataError(f"{name}, {self._first[0]}. It is the only bad row of {rows:,}; mend or remove it.")
        if self._count:
            more = f"; and {self._count - _SHOWN:,} more" if self._count > _SHOWN else ""
            raise DataError(
                f"{name}: {self._count:,} of {rows:,} rows are bad; mend or remove them. "
                f"{'; '.join(self._first)}{more}."
            )


def _tokenizer_content(tokenizer: Any) -> str:
    """Of everything that decides token ids, whatever folder the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(tokenizer)
    return digest(content, tokenizer.special_tokens_map, tokenizer.all_special_ids)


@lru_cache(maxsize=1)
def code_version() -> str:
    """Of this folder's code and templates: after any change here the cache is made anew."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("*.jinja")])
    return digest(*(path.read_text(encoding="utf-8") for path in files))


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
