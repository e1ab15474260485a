"""Curated rows as JSON lines, for people and for other programs. Left out: weights and shares, which are applied when training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from ....launcher.schema import Data
from ..samples import Samples
from ..tables import open_table
from .decide import Decision, training_sources


def export(decision: Decision, data: Data, folder: Path, *, kind: str, roles: tuple[str, ...]) -> list[Path]:
    """Writes train-K.jsonl and eval-K.jsonl for source K (from 1), the rows in their order and under our column names, and
    dropped.jsonl. The files appear whole or not at all; returned in order."""
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for k, source in enumerate(training_sources(data)):
        samples = Samples(open_table(source), source, kind=kind, roles=roles)
        targets = [(f"train-{k + 1}.jsonl", decision.train[k])]
        if decision.held is not None and len(decision.held[k]):
            targets.append((f"eval-{k + 1}.jsonl", decision.held[k]))
        owner = {int(place): i for i, (_, places) in enumerate(targets) for place in places}
        paths = [folder / name for name, _ in targets]
        files: list[IO[Any]] = [
            path.with_name(f".{path.name}.{os.getpid()}").open("w", encoding="utf-8") for path in paths
        ]
        try:
            for block in samples.blocks():
                for chunk in block.chunks():
                    for sample in chunk:
                        if (i := owner.get(sample.place)) is not None:
                            files[i].write(json.dumps(sample.row, ensure_ascii=False, default=str) + "\n")
        finally:
            for file in files:
                file.close()
        for file, path in zip(files, paths, strict=True):
            os.replace(file.name, path)
        made += paths
    shutil.copyfile(decision.folder / "dropped.jsonl", folder / "dropped.jsonl")
    return [*made, folder / "dropped.jsonl"]
