"""`trebuchet data prepare` and `inspect`: the training data curated, tokenized and checked ahead of a run, by one process or by
many, and shown.

Left out: what is done to the rows (`training/data/`).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import api, backends
from .cluster import load_cluster
from .config import load_config
from .errors import UserError
from .model_spec import load_model_spec


def prepare(config: str, *, overrides: Sequence[str] = (), output: str | None = None) -> dict[str, Any]:
    """Fills the cache that `run` and `submit` read; the report of the data as run.json holds it, and its `lines`. `output`: a folder for
    the curated rows as JSON lines. Raises DataError for what would also refuse the run."""
    checked = load_config(config, overrides)
    if output and not checked.data.curate:
        raise UserError("--output writes curated rows, and data.curate is not set; data.curate: true sets it.")
    from ..training.data import prepare as prepare_data
    from ..training.data.curate import curate
    from ..training.data.curate.export import export
    from ..training.data.prepare import kind_of

    spec = load_model_spec(checked.model)
    known = _tokenizer(checked, spec)
    seed = checked.optimization.seed
    made = prepare_data(
        checked.data, checked.objective, model_max_length=spec.max_position_embeddings, seed=seed, **known
    )
    report = made.report.to_dict() | {"lines": made.report.lines()}
    if output:
        kind, trained = kind_of(checked.objective), checked.data.train_on
        roles = trained if isinstance(trained, tuple) else ("assistant",)
        decision = curate(checked.data, kind=kind, roles=roles, seed=seed, cache=known["cache_dir"])
        files = export(decision, checked.data, Path(output).expanduser(), kind=kind, roles=roles)
        report["files"] = [str(path) for path in files]
    return report


def inspect(
    config: str, *, samples: int, overrides: Sequence[str] = (), colour: bool = False, page: bool = False
) -> str:
    """What the model will read and learn, as text for a terminal or as an HTML page, from the data section alone: nothing is
    planned, started or written but the cache."""
    checked = load_config(config, overrides)
    from ..training.data import inspect as looking
    from ..training.data import inspect_html
    from ..training.data import prepare as prepare_data

    spec = load_model_spec(checked.model)
    known = _tokenizer(checked, spec)
    made = prepare_data(
        checked.data,
        checked.objective,
        model_max_length=spec.max_position_embeddings,
        seed=checked.optimization.seed,
        **known,
    )
    seen = looking.look(made, known["tokenizer"], samples=samples)
    return inspect_html.page(seen, f"Data of {config}") if page else looking.terminal(seen, colour=colour)


def prepare_part(config: str, shards: int, shard: int, *, overrides: Sequence[str] = ()) -> int:
    """One of `shards` parts of the work, counted from 0; how many blocks of rows it made."""
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: with --shards {shards} it is a number from 0 to {shards - 1}.")
    checked = load_config(config, overrides)
    from ..training.data import prepare_part as part

    known = _tokenizer(checked, load_model_spec(checked.model))
    return part(checked.data, checked.objective, shards=shards, shard=shard, **known)


def prepare_on(cluster: str, config: str, shards: int, *, overrides: Sequence[str] = ()) -> list[str]:
    """All parts as jobs on the nodes of a cluster, waited for; a line for each that failed. What a part leaves out `prepare` makes
    here, and raises what was wrong with it."""
    if shards < 1:
        raise UserError(f"--shards {shards}: 1 or more.")
    where = load_cluster(cluster)
    module = backends.parts(where.scheduler)
    checked = load_config(config, overrides)
    cache = _tokenizer(checked, load_model_spec(checked.model))[
        "cache_dir"
    ]  # fetched here, where there may be a network
    folder = cache / "jobs" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    part = functools.partial(prepare_part, config, shards, overrides=tuple(overrides))
    handle, wait = module.parts(part, shards, where, folder=folder, name="data-prepare")
    print(f"{shards} parts are {handle}; waiting for them. Their logs: {folder}", file=sys.stderr)
    rows = wait()
    return [f"part {row['index']} (job {row['job']}): {row['error']}" for row in rows if row["error"]]


def _tokenizer(checked: Any, spec: Any) -> dict[str, Any]:
    if not api.can_read_data():
        raise UserError("preparing data needs torch, transformers and datasets: pip install 'trebuchet[train]'.")
    from ..training import load

    folder = load.model_folder(checked.model, spec)
    return {
        "tokenizer": load.load_tokenizer(folder, checked.model),
        "tokenizer_id": checked.model.name,
        "cache_dir": load.cache_folder() / "data",
    }
