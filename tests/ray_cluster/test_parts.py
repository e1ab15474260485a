"""Parts of the data as tasks of a real Ray cluster, put together on this side."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import data_verbs
from trebuchet.launcher.cluster import load_cluster
from trebuchet.ray_cluster import clusters, parts

from ..conftest import chat_rows, write_jsonl


@pytest.mark.slow
def test_parts_of_the_data_are_tasks_and_put_together_here(
    ray_cluster: Path, tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries are those that one process makes; a part that fails says why."""
    files = {
        f"data.{name}": str(write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(n)))
        for name, n in (("train", 31), ("eval", 9))
    }
    clusters.resize(ray_cluster.stem, 1, at_most=True)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(tiny_config(files)), encoding="utf-8")
    with monkeypatch.context() as elsewhere:  # where the cluster's own facts are is the session's cache
        elsewhere.setenv("TREBUCHET_CACHE", str(tmp_path / "alone"))
        alone = data_verbs.prepare(str(config))
    cache = Path(os.environ["TREBUCHET_CACHE"]) / "data"
    assert data_verbs.prepare_on(str(ray_cluster), str(config), 2) == []
    assert len(list(cache.glob("*-0"))) == 2  # a block of each source
    together = data_verbs.prepare(str(config))
    assert together["fingerprint"] == alone["fingerprint"] and not list(cache.glob("*-0"))

    half = functools.partial(operator.truediv, 1)
    (tmp_path / "job").mkdir()
    _, wait = parts.parts(half, 2, load_cluster(str(ray_cluster)), folder=tmp_path / "job", name="half")
    failed, done = wait()
    assert (failed["result"], failed["error"]) == (None, "ZeroDivisionError: division by zero")
    assert (done["result"], done["error"]) == (1.0, None)
