"""How much training data there is, as far as that can be told without reading it closely: for advice, hours and price.

Exact numbers come from tokenizing (`training/data`); these cost milliseconds and no import.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from .schema import Source, TrainConfig

# SmolLM2's tokenizer on English chat text (measured); code and other languages have fewer.
BYTES_PER_TOKEN = 4.5
LARGEST_COUNTED = 2**28  # bytes of a file whose lines are counted
LARGEST_PARSED = 2**24  # bytes of a file that is read whole for its rows; larger ones are not few


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Rows and approximate tokens of one pass over the training files; None where a source does not say."""

    examples: int | None
    tokens: int | None


def data_size(config: TrainConfig) -> DataSize:
    """Lines and bytes of local .jsonl files, rows of small .json and .csv files, bytes of large ones; Hub ids, folders and Parquet say
    nothing."""
    rows = [_rows(source) for source in config.data.train]
    tokens = [_tokens(source) for source in config.data.train]
    return DataSize(examples=_sum(rows), tokens=_sum(tokens))


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _rows(source: Source) -> int | None:
    file = Path(source.path).expanduser()
    largest = {".jsonl": LARGEST_COUNTED, ".json": LARGEST_PARSED, ".csv": LARGEST_PARSED}.get(file.suffix)
    if largest is None or not file.is_file() or file.stat().st_size > largest:
        return None
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            return round(sum(1 for line in lines if line.strip()) * source.weight)
    found = _parsed(file)
    return None if found is None else round(found * source.weight)


def _parsed(file: Path) -> int | None:
    """Entries of a JSON list, records of a CSV file below its header; None for what reads otherwise, which training will refuse."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            return max(0, sum(1 for row in csv.reader(text.splitlines(keepends=True)) if row) - 1)
        found = json.loads(text)
        return len(found) if isinstance(found, list) else None
    except (ValueError, csv.Error):
        return None


def _tokens(source: Source) -> int | None:
    file = Path(source.path).expanduser()
    if file.suffix not in (".jsonl", ".json", ".csv") or not file.is_file():
        return None
    return round(file.stat().st_size / BYTES_PER_TOKEN * source.weight)
