"""What was read, kept, cut and dropped, as plain data for the run record, and in a few lines for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .curation_report import CurationReport
from .packing import Rows
from .units import Units

_SHOWN = ("min", "median", "mean", "p95", "max")


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """One source as it was read. `spans` counts samples by how their trained part was found: generation, incremental,
    sentinel (chats), prefix (prompt and completion as text), whole (all of it). `bad_rows` were left out because
    data.skip_bad_rows asks for it; `bad` says where and why, of the first ten thousand."""

    path: str
    used_for: str
    layout: str
    rows: int
    tokens: int
    weight: float
    spans: dict[str, int]
    fingerprint: str
    bad_rows: int
    bad: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """The training set or the held-out set, as it is trained: after split, weights and the cut at max_length.

    `truncated` samples lost their right end, `no_loss_left` were dropped because nothing trained remained, `too_long` because
    their end is what is looked at (reward), `split`
    documents became several samples (objective pretrain). `packing_efficiency` is tokens over rows x max_length.
    `lengths` are tokens per document (a pair is two); `histogram` is (upper limit in tokens, samples up to it and above the one
    before).
    """

    samples: int
    tokens: int
    trained_tokens: int
    truncated: int
    no_loss_left: int
    too_long: int
    split: int
    duplicates: int
    rows: int
    packing_efficiency: float
    lengths: dict[str, float]
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """`leaked` training samples stood in the held-out set too and were removed; `shared_prompts` of those that stayed
    share only their prompt with it. `cached`: nothing had to be tokenized."""

    sources: tuple[SourceReport, ...]
    template: str | None
    max_length: int
    packing: bool
    train_on: str | tuple[str, ...]
    train: SetReport
    eval: SetReport | None
    leaked: int
    shared_prompts: int
    notes: tuple[str, ...]
    fingerprint: str
    cached: bool
    curation: CurationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For the terminal."""
        out = [
            f"{s.path}: {s.rows:,} rows ({s.layout}{'' if s.weight == 1 else f', weight {s.weight:g}'})"
            for s in self.sources
        ]
        for source in self.sources:
            if source.bad_rows:
                some = "; ".join(source.bad[:3])
                out.append(f"{source.path}: {source.bad_rows:,} bad rows left out (run.json lists them): {some}")
        out += self.curation.lines() if self.curation else []
        out.append(_line("train", self.train, self.packing))
        if self.eval:
            out.append(_line("eval", self.eval, self.packing))
        return [*out, *self.notes]


def describe(
    samples: Units,
    rows: Rows,
    *,
    max_length: int,
    truncated: int,
    lost: int,
    split: int,
    duplicates: int,
    too_long: int = 0,
) -> SetReport:
    """Counts of one set; `rows` is how it was packed."""
    lengths = samples.document_lengths
    tokens = int(lengths.sum())
    quantiles = (lengths.min(), np.median(lengths), lengths.mean(), np.quantile(lengths, 0.95), lengths.max())
    return SetReport(
        samples=len(samples),
        tokens=tokens,
        trained_tokens=int(samples.trained().sum()),
        truncated=truncated,
        no_loss_left=lost,
        too_long=too_long,
        split=split,
        duplicates=duplicates,
        rows=len(rows),
        packing_efficiency=round(tokens / (len(rows) * max_length), 4),
        lengths=dict(zip(_SHOWN, (round(float(q), 1) for q in quantiles), strict=True)),
        histogram=_histogram(lengths),
    )


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Powers of two."""
    powers = Counter(np.ceil(np.log2(lengths)).astype(int).tolist())
    return tuple((2**power, powers[power]) for power in range(min(powers), max(powers) + 1))


def _line(name: str, part: SetReport, packing: bool) -> str:
    share = part.trained_tokens / part.tokens
    text = f"{name}: {part.samples:,} samples, {part.tokens:,} tokens, {share:.0%} of them trained"
    if packing:
        text += f"; {part.rows:,} packed rows, {part.packing_efficiency:.1%} full"
    for count, what in (
        (part.truncated, "cut at max_length"),
        (part.no_loss_left, "dropped as nothing trained was left"),
        (part.too_long, "dropped as longer than max_length"),
        (part.split, "documents split"),
    ):
        text += f"; {count:,} {what}" if count else ""
    return text
