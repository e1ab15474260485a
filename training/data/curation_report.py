"""What curation did, as plain data for the run record and in a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """`removed` rows by reason in `detail` (for the hold-out: what it did), `left` rows of the training set after it; `limits` is what
    the step was told."""

    name: str
    removed: int
    left: int
    detail: Mapping[str, int]
    limits: Mapping[str, Any]

    def line(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.limits.items())
        why = ", ".join(f"{count:,} {reason}" for reason, count in self.detail.items())
        return f"  {self.name:<9}{self.removed:>10,} removed {self.left:>11,} left  {f'({told}) ' if told else ''}{why}".rstrip()


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """`rows` went in, `train` and `held_out` came out. The same files, data section and seed give the same `fingerprint`, steps and
    rows; `dropped` is the file that names every row that was removed."""

    rows: int
    train: int
    held_out: int
    seed: int
    steps: tuple[Step, ...]
    fingerprint: str
    dropped: str

    def lines(self) -> list[str]:
        gone = sum(step.removed for step in self.steps)
        head = f"curated: {self.rows:,} rows, {gone:,} removed, {self.train:,} train, {self.held_out:,} held out"
        return [
            head,
            *(step.line() for step in self.steps),
            *([f"  every one of them: {self.dropped}"] if gone else []),
        ]
