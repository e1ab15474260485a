"""From the data section of a configuration to memory-mapped token sets, with a report, in one call.

Sources are tokenized one by one, each into a cache entry of its own (`store.py`); split, weights, length and packing are arithmetic
on top. So every rank may call `prepare`: one does the work, the others wait and map the same files. Left out: torch, the model,
and the order of rows (`order.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...launcher.errors import DataError
from ...launcher.schema import Data, Objective, Source
from . import preflight, selection
from .encoding import Encoder
from .layouts import Example, check_columns, convert, recognise, rename
from .packing import Rows, pack
from .readers import RowError
from .rendering import Renderer, find_template
from .report import DataReport, SetReport, SourceReport, describe
from .store import Store, Writer, build_store, open_store
from .tables import Numbered, Table, open_table
from .tokens import TokenSet

_CHUNK = 1000  # rows tokenized in one call; larger ones are no faster (feeds both cores), smaller ones cost Python time
_SHOWN = 3  # bad rows spelled out in an error


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`train_rows` and `eval_rows` are the packed rows, sample indices into `train` and `eval`. `chat_template` is the text of the
    template that was used, for the tokenizer that is saved with the model; None when no sample needed one."""

    train: TokenSet
    eval: TokenSet | None
    train_rows: Rows
    eval_rows: Rows
    report: DataReport
    chat_template: str | None
    fingerprint: str


def prepare(
    data: Data,
    objective: Objective,
    *,
    tokenizer: Any,
    tokenizer_id: str,
    model_max_length: int | None,
    cache_dir: Path,
    seed: int,
) -> Prepared:
    """Reads, recognises, renders, tokenizes, masks, checks and caches; a second call with the same content maps the cache.

    `tokenizer` is a fast transformers tokenizer, `tokenizer_id` its name in messages. `model_max_length` is the model's number of
    positions, None when it has no limit. Raises DataError for anything in the data, the template or the configuration that
    would train something else than was asked for; then the cache holds nothing of the source at fault.
    """
    preflight.check_positions(data.max_length, model_max_length, tokenizer_id)
    pretrain = objective.name == "pretrain"
    renderer = None if pretrain else find_template(data.chat_template, tokenizer, tokenizer_id)
    reader = _Reader(
        tokenizer=tokenizer,
        tokenizer_id=tokenizer_id,
        renderer=renderer,
        data=data,
        pretrain=pretrain,
        cache=Path(cache_dir),
    )
    train_stores = [reader.read(source, "train") for source in data.train]
    own_eval = () if isinstance(data.eval, float) else data.eval
    eval_stores = [reader.read(source, "eval") for source in own_eval]

    train, leaked, shared = selection.whole(train_stores), 0, 0
    held: TokenSet | None = None
    if eval_stores:
        held = selection.whole(eval_stores)
        train, leaked, shared = selection.remove_leaks(train, held)
        preflight.check_empty(len(train), "the training set", f": all {leaked:,} samples stand in data.eval too")
    elif data.eval:
        train, held = selection.hold_out(train, float(data.eval), seed)  # type: ignore[arg-type]  # not sources: a share
    train = selection.weigh(train, [source.weight for source in data.train], seed)
    preflight.check_empty(len(train), "the training set", ": the weights leave no sample")

    finish = _Finish(data=data, pretrain=pretrain, model_max_length=model_max_length, seed=seed)
    train, train_rows, train_report = finish(train, "training data")
    held, eval_rows, eval_report = finish(held, "held-out data") if held else (None, (), None)
    fingerprint = _digest(
        [store.key for store in (*train_stores, *eval_stores)],
        data.model_dump(mode="json"),
        objective.name,
        seed,
        _code_version(),
    )
    report = DataReport(
        sources=tuple(reader.reports),
        template=renderer.origin if renderer and reader.rendered else None,
        max_length=data.max_length,
        packing=data.packing,
        train_on="all" if pretrain else data.train_on,
        train=train_report,
        eval=eval_report,
        leaked=leaked,
        shared_prompts=shared,
        notes=tuple(_notes(train_report, eval_report, leaked, shared)),
        fingerprint=fingerprint,
        cached=reader.cached,
    )
    return Prepared(
        train=train,
        eval=held,
        train_rows=train_rows,
        eval_rows=eval_rows,
        report=report,
        chat_template=renderer.template if renderer and reader.rendered else None,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, kw_only=True)
class _Finish:
    """The cut at max_length, the checks that need lengths, and packing, of one set."""

    data: Data
    pretrain: bool
    model_max_length: int | None
    seed: int

    def __call__(self, samples: TokenSet, what: str) -> tuple[TokenSet, Rows, SetReport]:
        limit = self.data.max_length
        duplicates = len(samples) - len(np.unique(selection.field(samples, "whole")))
        truncated = lost = split = 0
        if self.pretrain:
            samples, split = selection.split_documents(samples, limit)
        else:
            preflight.check_truncation(
                samples.lengths,
                what=what,
                max_length=limit,
                limit=self.data.max_truncated,
                model_max_length=self.model_max_length,
            )
            samples, truncated, lost = selection.cut(samples, limit)
            preflight.check_empty(
                len(samples), what, f": the prompts alone fill data.max_length {limit} in all {lost:,} samples"
            )
        rows = pack(samples.lengths, limit, self.seed, packing=self.data.packing)
        report = describe(
            samples, rows, max_length=limit, truncated=truncated, lost=lost, split=split, duplicates=duplicates
        )
        return samples, rows, report


class _Reader:
    """Sources into stores, one cache entry each."""

    def __init__(
        self, *, tokenizer: Any, tokenizer_id: str, renderer: Renderer | None, data: Data, pretrain: bool, cache: Path
    ):
        self.tokenizer, self.tokenizer_id, self.renderer, self.pretrain, self.cache = (
            tokenizer,
            tokenizer_id,
            renderer,
            pretrain,
            cache,
        )
        self.train_on = "all" if pretrain else data.train_on
        self.reports: list[SourceReport] = []
        self.cached = True
        self.rendered = False
        self._identity = _digest(
            _code_version(), tokenizer_content(tokenizer), renderer.template if renderer else None, self.train_on, pretrain,
            version("tokenizers"), version("transformers"),
        )  # fmt: skip

    def read(self, source: Source, used_for: str) -> Store:
        check_columns(source.columns, source.path)
        table = open_table(source)
        key = _digest(self._identity, table.digest(self.cache / "files"), source.format, dict(source.columns))
        store = open_store(self.cache, key)
        if store is None:
            self.cached = False
            store = build_store(self.cache, key, lambda writer: self._fill(writer, table, source))
        meta = store.meta
        chats = any(method in meta["spans"] for method in ("generation", "incremental", "sentinel")) or meta["chats"]
        origin = self.renderer.origin if self.renderer and chats else None
        self.rendered |= origin is not None
        preflight.check_store(store, table.name, table.unit, origin, self.tokenizer)
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
        encoder = Encoder(self.tokenizer, self.tokenizer_id, self.renderer, train_on=self.train_on)
        bad = _BadRows(table)
        faults: preflight.Faults = {}
        spans: Counter[str] = Counter()
        layout: str | None = None
        rows = chats = 0
        numbered = table.rows()
        while chunk := list(islice(numbered, _CHUNK)):
            rows += len(chunk)
            if layout is None:
                layout = self._layout(chunk, source, table)
            examples = [(number, e) for number, e in self._examples(chunk, layout, source, bad)]
            for (number, example), encoded in zip(examples, encoder.encode([e for _, e in examples]), strict=True):
                if isinstance(encoded, RowError):
                    bad.add(number, encoded)
                    continue
                preflight.note_faults(faults, number, example, encoded, encoder)
                spans[encoded.method] += 1
                chats += not hasattr(example, "completion")
                writer.add(encoded.ids, encoded.mask, row=number, keys=example.keys())
        bad.raise_if_any(rows)
        preflight.check_empty(rows, table.name, ": it holds no rows")
        return {"layout": layout, "rows": rows, "spans": dict(spans), "chats": chats, "faults": faults}

    def _layout(self, chunk: list[Numbered], source: Source, table: Table) -> str | None:
        first = next((row for _, row in chunk if isinstance(row, dict)), None)
        if first is None:
            return None
        return recognise(rename(first, source.columns).keys(), source.format, pretrain=self.pretrain, source=table.name)

    def _examples(
        self, chunk: list[Numbered], layout: str | None, source: Source, bad: _BadRows
    ) -> Iterator[tuple[int, Example]]:
        for number, row in chunk:
            try:
                if isinstance(row, RowError):
                    raise row
                assert layout is not None  # a row that is a dict has decided it
                yield number, convert(rename(row, source.columns), layout)
            except RowError as error:
                bad.add(number, error)


class _BadRows:
    """Counts all, keeps the first few."""

    def __init__(self, table: Table):
        self._table, self._first, self._count = table, [], 0  # type: ignore[var-annotated]

    def add(self, number: int, error: RowError) -> None:
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{self._table.unit} {number}: {error}")

    def raise_if_any(self, rows: int) -> None:
        if self._count == 1:
            raise DataError(
                f"{self._table.name}, {self._first[0]}. It is the only bad row of {rows:,}; mend or remove it."
            )
        if self._count:
            more = "" if self._count <= _SHOWN else f"; and {self._count - _SHOWN:,} more"
            raise DataError(
                f"{self._table.name}: {self._count:,} of {rows:,} rows are bad. {'; '.join(self._first)}{more}. Mend or remove them."
            )


def tokenizer_content(tokenizer: Any) -> str:
    """Digest of everything about a tokenizer that decides token ids, whatever folder it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest(
        backend.to_str() if backend is not None else repr(tokenizer),
        tokenizer.special_tokens_map,
        tokenizer.all_special_ids,
    )


def _notes(train: SetReport, held: SetReport | None, leaked: int, shared: int) -> Iterator[str]:
    if leaked:
        yield f"{leaked:,} training samples stand in the held-out data too and were removed"
    if shared:
        yield f"{shared:,} training samples share their prompt with a held-out one but have another answer; they stay"
    if train.duplicates:
        yield f"{train.duplicates:,} training samples are exact repeats"
    if held and held.samples < 20:
        yield f"only {held.samples} held-out samples: the evaluation loss will be noisy"


@lru_cache(maxsize=1)
def _code_version() -> str:
    """Digest of this folder's code and templates: after any change here the cache is made anew."""
    folder = Path(__file__).parent
    return _digest(
        *(
            path.read_text(encoding="utf-8")
            for path in sorted([*folder.glob("*.py"), *folder.glob("templates/*.jinja")])
        )
    )


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
