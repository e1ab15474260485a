"""One source at a time: read, recognised, rendered, tokenized, checked, into a cache entry of its own.

The key of an entry is made of everything that decides its bytes: the content of the files, how their columns are
read, the template, the tokenizer, which tokens are trained, the code of this folder and the versions of the two
libraries. Left out: everything that can be decided afterwards (split, weights, length, seed).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ...launcher.schema import Source
from . import preflight
from .encoding import Encoded, Encoder, joined
from .entries import remove
from .preferences import parts
from .readers import RowError
from .rendering import Renderer
from .report import SourceReport
from .samples import BadRows, Block, Samples, refuse
from .store import Store, Writer, build_store, open_store
from .tables import open_table
from .turns import Chat


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
        skip_bad_rows: bool = False,
    ):
        self.tokenizer, self.tokenizer_id, self.renderer = tokenizer, tokenizer_id, renderer
        self.train_on, self.kind, self.cache, self.skip_bad_rows = train_on, kind, cache, skip_bad_rows
        self.roles = train_on if isinstance(train_on, tuple) else ("assistant",)
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

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.tokenizer_id, self.renderer, train_on=self.train_on)

    def store(self, source: Source, used_for: str) -> Store:
        """Raises DataError for whatever is wrong with the source. A source with a bad row leaves no entry unless they are to be
        skipped; one whose masks are at fault does, and is refused again from its record."""
        samples, key = self.open(source)
        table = samples.table
        store, made = build_store(self.cache, key, lambda writer: self._fill(writer, samples, key))
        self.cached &= not made
        meta = store.meta
        bad = BadRows()
        bad.merge(*meta["bad"])
        if not self.skip_bad_rows:  # an entry may have been made by a run that skips them
            refuse(bad, meta["rows"], table)
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
                bad_rows=bad.count,
                bad=tuple(f"{table.unit} {number}: {why}" for number, why in bad.first),
            )
        )
        return store

    def part(self, source: Source, wanted: Callable[[int], bool]) -> int:
        """Makes the entries of the blocks that are wanted; how many there were. `store` takes them up."""
        samples, key = self.open(source)
        if open_store(self.cache, key):
            return 0
        count = 0
        for block in samples.blocks():
            if wanted(block.number):
                build_store(self.cache, f"{key}-{block.number}", partial(self._block, block=block))
                count += 1
        return count

    def open(self, source: Source) -> tuple[Samples, str]:
        """The rows of a source, and the key of its entry."""
        samples = self.samples(source)
        content = samples.table.digest(self.cache / "files")
        return samples, digest(self._identity, content, source.format, dict(source.columns))

    def samples(self, source: Source) -> Samples:
        return Samples(open_table(source), source, kind=self.kind, roles=self.roles)

    def _fill(self, writer: Writer, samples: Samples, key: str) -> dict[str, Any]:
        """Tokenizes all rows, or takes over blocks that were made before; returns what the entry's record holds."""
        total, parts = _Counts(), []
        for block in samples.blocks():
            name = f"{key}-{block.number}"
            parts.append(name)
            if part := open_store(self.cache, name):
                writer.append(part)
                total.add(part.meta)
            else:
                total.add(self._block(writer, block))
        if not self.skip_bad_rows:
            refuse(total.bad, total.rows, samples.table)
        preflight.check_empty(total.rows, samples.table.name, ": it holds no rows")
        preflight.check_empty(writer.samples, samples.table.name, f": all {total.rows:,} rows are bad")
        for name in parts:
            remove(self.cache / name)
        return {"layout": samples.layout} | total.record()

    def _block(self, writer: Writer, block: Block) -> dict[str, Any]:
        """Tokenizes the rows of one block."""
        encoder = self.encoder
        faults: preflight.Faults = {}
        spans: Counter[str] = Counter()
        chats = 0
        for chunk in block.chunks():
            results = iter(encoder.encode([part for sample in chunk for part in parts(sample.example)]))
            for sample in chunk:
                sides = list(zip(parts(sample.example), islice(results, len(parts(sample.example))), strict=True))
                if wrong := next((found for _, found in sides if isinstance(found, RowError)), None):
                    block.bad.add(sample.number, wrong)
                    continue
                for side, encoded in sides:
                    assert isinstance(encoded, Encoded)  # the others went to `bad`
                    if not spans:
                        encoder.check_agreement(side, encoded)
                    preflight.note_faults(faults, sample.number, side, encoded, encoder)
                    spans[encoded.method] += 1
                    chats += isinstance(side, Chat)
                together = joined([found for _, found in sides if isinstance(found, Encoded)], sample.example)
                writer.add(**together, row=sample.number, place=sample.place, keys=sample.keys)
        bad = (block.bad.count, block.bad.first)
        return {"rows": block.rows, "chats": chats, "spans": dict(spans), "faults": faults, "bad": bad}


class _Counts:
    """The records of blocks, added up."""

    def __init__(self) -> None:
        self.rows = self.chats = 0
        self.spans: Counter[str] = Counter()
        self.faults: preflight.Faults = {}
        self.bad = BadRows()

    def add(self, block: dict[str, Any]) -> None:
        self.rows += block["rows"]
        self.chats += block["chats"]
        self.spans.update(block["spans"])
        for kind, (count, row) in block["faults"].items():
            known = self.faults.setdefault(kind, [0, row])
            known[0] += count
        self.bad.merge(*block["bad"])

    def record(self) -> dict[str, Any]:
        bad = (self.bad.count, self.bad.first)
        return {"rows": self.rows, "chats": self.chats, "spans": dict(self.spans), "faults": self.faults, "bad": bad}


def _tokenizer_content(tokenizer: Any) -> str:
    """Of everything that decides token ids, whatever folder the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(tokenizer)
    return digest(content, tokenizer.special_tokens_map, tokenizer.all_special_ids)


@lru_cache(maxsize=1)
def code_version() -> str:
    """Of the code and templates of this folder and those in it: after any change here the cache is made anew."""
    folder = Path(__file__).parent
    files = sorted([*folder.rglob("*.py"), *folder.glob("*.jinja")])
    return digest(*(path.read_text(encoding="utf-8") for path in files))


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
