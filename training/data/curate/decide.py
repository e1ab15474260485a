"""Which rows train, which are held out, and why the others do neither, as an entry of the cache.

Everything is a function of (files, configuration, seed), whatever order the sheets were made in; the steps are in `steps.py`. Left
out: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....launcher.schema import Data, Source
from .. import entries
from ..curation_report import CurationReport, Step
from ..intake import code_version, digest
from ..samples import Samples
from ..tables import open_table
from . import reward
from .rows import Maker
from .steps import Run


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`train[k]` and `held[k]` are the places (`samples.py`) of the rows of source k, ascending; the sources are those of data.train
    and then data.general's. `held` is None when data.eval is not a share. `folder` holds dropped.jsonl, one line a row."""

    train: tuple[np.ndarray, ...]
    held: tuple[np.ndarray, ...] | None
    report: CurationReport
    folder: Path
    cached: bool


def curate(data: Data, *, kind: str, roles: tuple[str, ...], seed: int, cache: Path) -> Decision:
    """Raises DataError for rows that cannot be read, and when nothing is left."""
    wanted = data.curate
    assert wanted is not None
    maker = Maker(wanted, skip_bad_rows=data.skip_bad_rows, cache=cache)
    sources = training_sources(data)
    own_eval = () if isinstance(data.eval, float) else data.eval
    opened = [Samples(open_table(source), source, kind=kind, roles=roles) for source in (*sources, *own_eval)]
    contents = [samples.table.digest(cache / "files") for samples in opened]
    made = [
        maker.sheet(samples, content, filtered=k < len(sources))
        for k, (samples, content) in enumerate(zip(opened, contents, strict=True))
    ]
    key = digest(
        code_version(),
        [name for _, name in made],
        wanted.model_dump(mode="json"),
        reward.content(wanted.reward, cache / "files") if wanted.reward else None,
        data.eval if isinstance(data.eval, float) else len(own_eval),
        seed,
    )

    def fill(folder: Path) -> dict[str, Any]:
        scorer = reward.Scorer(wanted.reward) if wanted.reward else None
        run = Run(wanted, [sheet for sheet, _ in made], opened, len(sources), general_sources(data), seed, scorer)
        return run.write(folder, data.eval if isinstance(data.eval, float) else None, key)

    found, fresh = entries.build(maker.cache, key, _opened, fill)
    return Decision(**found, cached=maker.cached and not fresh)


def training_sources(data: Data) -> tuple[Source, ...]:
    """Those of data.train, and data.general's behind them."""
    return (*data.train, *(data.general.sources if data.general else ()))


def general_sources(data: Data) -> int:
    return len(data.general.sources) if data.general else 0


def _opened(folder: Path) -> dict[str, Any] | None:
    if (meta := entries.read_meta(folder)) is None:
        return None
    try:
        with np.load(folder / "places.npz") as places:
            train = tuple(places[f"train{k}"] for k in range(meta["sources"]))
            held = tuple(places[f"held{k}"] for k in range(meta["sources"])) if meta["shared"] else None
    except (OSError, ValueError, KeyError):
        return None
    steps = tuple(Step(**step) for step in meta["report"].pop("steps"))
    report = CurationReport(**meta["report"], steps=steps, dropped=str(folder / "dropped.jsonl"))
    return {"train": train, "held": held, "report": report, "folder": folder}
