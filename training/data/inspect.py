"""What the model will read and learn, for people: samples with their trained tokens, and the counts of a data report.

`look(...)` gathers, `terminal(...)` writes it in colour or with plain marks; the HTML page is `inspect_html.py`'s. What is
shown comes from the token ids that training reads, decoded; not from the text that they were made of.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .prepare import Prepared
from .report import DataReport, SetReport
from .units import JudgedSet, PairSet, Units

GREEN, FAINT, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there is no colour


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of tokens that are all trained, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One document of a unit. `title` says what it is: sample, chosen, rejected, wanted, unwanted."""

    title: str
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Look:
    """`units`: (number in the set, its documents), from the training set."""

    units: tuple[tuple[int, tuple[Shown, ...]], ...]
    report: DataReport


def look(prepared: Prepared, tokenizer: Any, *, samples: int) -> Look:
    """`samples` units spread evenly over the training set, as they are trained: cut, masked, in their order."""
    units = prepared.train
    count = min(samples, len(units))
    picked = [(2 * i + 1) * len(units) // (2 * count) for i in range(count)]
    return Look(units=tuple((i, tuple(_documents(units, i, tokenizer))) for i in picked), report=prepared.report)


def _documents(units: Units, i: int, tokenizer: Any) -> Iterator[Shown]:
    titles: Sequence[str] = ("sample",)
    if isinstance(units, PairSet):
        titles = ("chosen", "rejected")
    elif isinstance(units, JudgedSet):
        titles = ("wanted (label true)" if units.labels[i] else "unwanted (label false)",)
    for title, (ids, mask) in zip(titles, units.documents(i), strict=True):
        yield Shown(title=title, tokens=len(ids), trained=int(mask.sum()), pieces=tuple(_pieces(ids, mask, tokenizer)))


def _pieces(ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Iterator[Piece]:
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for start, stop in pairwise(edges):
        run = ids[start:stop].tolist()
        text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text=text, trained=bool(mask[start]))


def terminal(seen: Look, *, colour: bool) -> str:
    """Text for a terminal: trained tokens green, or between ⟦ and ⟧."""
    bold, faint, end = (BOLD, FAINT, RESET) if colour else ("", "", "")
    lines: list[str] = []
    for number, documents in seen.units:
        for document in documents:
            share = f"{document.trained:,} of {document.tokens:,} tokens trained"
            lines += [f"{bold}{number + 1}  {document.title}{end}  {faint}{share}{end}", _marked(document, colour), ""]
    return "\n".join([*lines, *counts(seen.report), ""])


def _marked(document: Shown, colour: bool) -> str:
    before, after = (GREEN, RESET) if colour else (OPEN, CLOSE)
    return "".join(f"{before}{visible(p.text)}{after}" if p.trained else visible(p.text) for p in document.pieces)


def visible(text: str) -> str:
    """Control characters as symbols: what stands in a data set must not move the cursor or colour what it does not own."""
    return "".join(_symbol(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c for c in text)


def _symbol(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def counts(report: DataReport) -> list[str]:
    """The counts of the whole data set, line by line."""
    out = [f"template: {report.template or 'none'}; trained on: {_roles(report.train_on)}"]
    for source in report.sources:
        spans = ", ".join(f"{count:,} by {how}" for how, count in source.spans.items())
        out.append(f"{source.path} ({source.used_for}): {source.rows:,} rows, {source.layout}; masks: {spans}")
    for name, part in (("train", report.train), ("eval", report.eval)):
        if part is not None:
            out += ["", *_set_lines(name, part, report.packing)]
    return [*out, "", *report.notes] if report.notes else out


def _roles(train_on: str | tuple[str, ...]) -> str:
    return train_on if isinstance(train_on, str) else ", ".join(train_on)


def facts(part: SetReport, packing: bool) -> dict[str, str]:
    """What is said of one set, by name."""
    share = part.trained_tokens / max(part.tokens, 1)
    dropped = {"nothing trained was left": part.no_loss_left, "longer than max_length": part.too_long}
    why = "; ".join(f"{count:,} as {reason}" for reason, count in dropped.items() if count)
    out = {
        "samples": f"{part.samples:,}",
        "tokens": f"{part.tokens:,}",
        "trained": f"{part.trained_tokens:,} ({share:.1%})",
        "cut at max_length": f"{part.truncated:,}",
        "dropped": why or "0",
        "exact repeats": f"{part.duplicates:,}",
        "length": ", ".join(f"{name} {value:g}" for name, value in part.lengths.items()),
    }
    if part.split:
        out["documents split"] = f"{part.split:,}"
    if packing:
        out["packing"] = f"{part.rows:,} rows, {part.packing_efficiency:.1%} full"
    return out


def _set_lines(name: str, part: SetReport, packing: bool) -> Iterator[str]:
    yield name
    for key, value in facts(part, packing).items():
        yield f"  {key:<18} {value}"
    most = max(count for _, count in part.histogram)
    for limit, count in part.histogram:
        yield f"  {f'up to {limit:,} tokens':<18} {'#' * -(-count * 40 // most):<40} {count:,}"
