"""Samples into the records of a sheet: words, signature, and what the filters say; a block of rows at a time.

Left out: everything that compares rows (`decide.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ....launcher.schema_curate import Curate
from .. import entries
from ..intake import code_version, digest
from ..preferences import Anything, Judged, Pair
from ..samples import BadRows, Block, Sample, Samples, refuse
from ..turns import Chat, Example
from . import filters, rules, together
from .sheet import ROW, Sheet, SheetWriter, open_sheet
from .words import PERMUTATIONS, Numbering, filled, repetitions, signatures

_AT_ONCE = 250  # texts whose signatures are made in one call: their 3-grams then stay in a processor's cache


class Maker:
    """Makes the sheets of sources under one configuration; `cached` stays True as long as nothing had to be made."""

    def __init__(self, curate: Curate, *, skip_bad_rows: bool, cache: Path):
        self.curate, self.skip, self.cache = curate, skip_bad_rows, cache / "curate"
        self.cached = True
        self.bad: dict[str, BadRows] = {}
        per_row = curate.model_dump(
            include={"min_words", "max_words", "max_repetition", "damaged", "refusals", "languages"}
        )
        by = curate.balance.by if curate.balance else None
        self._identity = (code_version(), per_row, by, rules.content(curate.rules, curate.function))

    def key(self, samples: Samples, content: str, filtered: bool) -> str:
        source = samples.source
        return digest(
            self._identity, content, source.format, dict(source.columns), samples.kind, samples.roles, filtered
        )

    def sheet(self, samples: Samples, content: str, *, filtered: bool) -> tuple[Sheet, str]:
        """(of all rows, its key). `content` identifies the bytes of the source; `filtered`: the filters apply. Raises DataError for bad
        rows unless they are to be skipped."""
        key = self.key(samples, content, filtered)
        sheet, made = entries.build(
            self.cache, key, open_sheet, lambda folder: self._fill(folder, samples, content, filtered)
        )
        self.cached &= not made
        bad = BadRows()
        bad.merge(*sheet.meta["bad"])
        if not self.skip:
            refuse(bad, sheet.meta["rows"], samples.table)
        self.bad[samples.table.name] = bad
        return sheet, key

    def part(self, samples: Samples, content: str, wanted: Callable[[int], bool], *, filtered: bool) -> int:
        """Makes the entries of the blocks that are wanted; how many there were."""
        key, count = self.key(samples, content, filtered), 0
        if open_sheet(self.cache / key) is not None:
            return 0
        for block in samples.blocks():
            if wanted(block.number):
                name = f"{key}-{block.number}"
                entries.build(self.cache, name, open_sheet, lambda folder, b=block: self._part(folder, b, filtered))  # type: ignore[misc]
                count += 1
        return count

    def _part(self, folder: Path, block: Block, filtered: bool) -> dict[str, Any]:
        writer = SheetWriter(folder)
        try:
            self._block(writer, block, filtered)
            return {"rows": block.rows, "bad": (block.bad.count, block.bad.first)} | writer.finish()
        finally:
            writer.close()

    def _fill(self, folder: Path, samples: Samples, content: str, filtered: bool) -> dict[str, Any]:
        key = self.key(samples, content, filtered)
        together.blocks(self, samples, content, filtered=filtered)
        writer, rows, bad, parts = SheetWriter(folder), 0, BadRows(), []
        try:
            for block in samples.blocks():
                name = self.cache / f"{key}-{block.number}"
                parts.append(name)
                if part := open_sheet(name):
                    writer.append(part)
                    rows += part.meta["rows"]
                    bad.merge(*part.meta["bad"])
                else:
                    self._block(writer, block, filtered)
                    rows += block.rows
                    bad.merge(block.bad.count, block.bad.first)
            if not self.skip:
                refuse(bad, rows, samples.table)
            meta = {"rows": rows, "bad": (bad.count, bad.first)} | writer.finish()
        finally:
            writer.close()
        for name in parts:
            entries.remove(name)
        return meta

    def _block(self, writer: SheetWriter, block: Block, filtered: bool) -> None:
        judge = _judge(self.curate) if filtered else lambda *_: None
        by = self.curate.balance.by if self.curate.balance else None
        numbering = Numbering()
        for chunk in block.chunks():
            for at in range(0, len(chunk), _AT_ONCE):
                _write(writer, chunk[at : at + _AT_ONCE], judge, by, numbering)


def _write(
    writer: SheetWriter, samples: list[Sample], judge: Callable[..., str | None], by: str | None, numbering: Numbering
) -> None:
    rows = np.zeros(len(samples), ROW)
    reasons: dict[str, int] = {}
    values: dict[str, int] = {}
    parts = [texts_of(sample.example) for sample in samples]
    answers = [numbering.words(answer) for _, answer, _ in parts]
    counts = np.array([len(words) for words in answers])
    repeated = repetitions(_flat(answers), counts)
    texts: list[list[int]] = []
    for i, sample in enumerate(samples):
        prompt, answer, rest = parts[i]
        reason = judge(sample, prompt, answer, len(answers[i]), float(repeated[i]))
        whole = filled([*numbering.words(prompt), *answers[i], *numbering.words(rest)]) if reason is None else []
        value = None if by is None else json.dumps(rules.look_up(sample.row, by), ensure_ascii=False, default=str)
        label = int(sample.example.label) if isinstance(sample.example, Judged) else -1
        number = -1 if reason is None else reasons.setdefault(reason, len(reasons))
        which = -1 if value is None else values.setdefault(value, len(values))
        text = _hash(prompt, answer, rest, sample.example)
        rows[i] = (sample.place, sample.number, sample.keys[0], text, 0, len(whole), number, which, label)
        texts.append(whole)
    rows["offset"] = np.cumsum(rows["count"]) - rows["count"]
    words = _flat(texts)
    signed = np.zeros((len(rows), PERMUTATIONS), np.uint32)
    good = rows["count"] > 0
    signed[good] = signatures(words, rows["count"][good])
    writer.add(rows, words, signed, list(reasons), list(values))


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.uint32, sum(map(len, lists)))


def _judge(curate: Curate) -> Callable[..., str | None]:
    """The first reason of all filters and rules, or None."""
    checks = filters.checks(curate)
    verdicts = [verdict for path in curate.rules for verdict in rules.load_rules(path)]
    if curate.function:
        verdicts.append(rules.load_function(curate.function))

    def judge(sample: Sample, prompt: str, answer: str, count: int, repeated: float) -> str | None:
        found: Iterable[str | None] = (check(prompt, answer, count, repeated) for check in checks)
        if reason := next(filter(None, found), None):
            return reason
        if verdicts:
            own = {"$prompt": prompt, "$answer": answer, "$text": f"{prompt}\n{answer}"}
            return next(filter(None, (verdict(sample.row, own) for verdict in verdicts)), None)
        return None

    return judge


def texts_of(example: Anything) -> tuple[str, str, str]:
    """(prompt, answer, the rest): system prompts are left out, because many rows share one; the rest is an answer that is there to be
    avoided (rejected, or with label false), which quality filters have no say in."""
    if isinstance(example, Pair):
        prompt, chosen = _two(example.chosen)
        return prompt, chosen, _two(example.rejected)[1]
    if isinstance(example, Judged):
        prompt, answer = _two(example.example)
        return (prompt, answer, "") if example.label else (prompt, "", answer)
    return (*_two(example), "")


def _two(example: Example) -> tuple[str, str]:
    if not isinstance(example, Chat):
        return example.prompt, example.completion
    trained = set(example.trained())
    texts: tuple[list[str], list[str]] = ([], [])
    for i, message in enumerate(example.messages):
        if message["role"] != "system":
            texts[i in trained].append(message["content"])
    return "\n".join(texts[0]), "\n".join(texts[1])


def _hash(prompt: str, answer: str, rest: str, example: Anything) -> int:
    """Of the text with white space made even, and of the label."""
    label = example.label if isinstance(example, Judged) else None
    even = "\0".join([*(" ".join(text.split()) for text in (prompt, answer, rest)), str(label)])
    return int.from_bytes(hashlib.blake2b(even.encode("utf-8"), digest_size=8).digest(), "little")
