"""Tokenized data that the tasks of several nodes make at the same moment in one shared cache: whole for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trebuchet.slurm.fanout import fan_out, gather
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster
from .conftest import HERE

TASKS, SAMPLES = 4, 3000


@pytest.mark.slow
def test_tasks_that_write_one_entry_at_once_all_read_it_whole(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Once where the file system knows locks: one task does the work. And once where it knows none (Lustre without -o flock): all do it
    side by side, and one result stays."""

    def call(task: int) -> list[tuple[bool, int, int]]:
        import errno
        import fcntl
        import time

        import numpy as np
        from trebuchet.training.data.store import build_store

        def fill(writer: Any) -> dict[str, Any]:
            (tmp_path / f"{key}-{task}").touch()
            while key == "none" and len(list(tmp_path.glob("none-*"))) < TASKS:  # nobody is done before all have begun
                time.sleep(0.01)
            for n in range(SAMPLES):
                ids = np.arange(n % 7 + 1, dtype=np.int32)
                writer.add(ids, np.ones(len(ids), np.uint8), row=n, place=n, keys=(n, n))
            return {"by": task}

        def no_locks(*arguments: Any) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        found = []
        for key in ("locks", "none"):
            (tmp_path / f"ready-{key}-{task}").touch()
            while len(list(tmp_path.glob(f"ready-{key}-*"))) < TASKS:
                time.sleep(0.01)
            if key == "none":
                fcntl.flock = no_locks  # type: ignore[assignment]
            store, made = build_store(tmp_path / "cache", key, fill)
            found.append((made, int(store.ids.sum()), len(store.samples)))
        return found

    site = build_site({"partition": "low", "time": "5", "environment": HERE}, "test")
    rows = gather(fan_out(call, range(TASKS), site=site, folder=tmp_path / "array", name="cache"))
    assert [row["error"] for row in rows] == [None] * TASKS, rows
    total = sum(sum(range(n % 7 + 1)) for n in range(SAMPLES))
    with_locks, without = zip(*(row["result"] for row in rows), strict=True)
    assert {found[1:] for found in (*with_locks, *without)} == {(total, SAMPLES)}
    assert sum(made for made, *_ in with_locks) == 1 == len(list(tmp_path.glob("locks-*")))
    assert len(list(tmp_path.glob("none-*"))) == TASKS
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == ["locks", "none"]
