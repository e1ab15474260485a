"""Runs of a tiny model as jobs of a real Ray cluster: to their end, resized, with lost ranks, cancelled, refused."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from trebuchet.launcher import api, logs, record
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.ray_cluster import clusters
from trebuchet.ray_cluster.state import cluster_folder

if TYPE_CHECKING:
    from trebuchet.training.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # 100 s on an idle machine of two cores
Config = Callable[..., dict[str, Any]]
# More steps than any machine does while nodes come and go: the run ends when the test has seen enough and cancels it. The rate is
# constant, so that the losses do not depend on the number of steps that was asked for. Small micro-batches need little memory.
LONG = {
    "optimization.max_steps": 20_000, "optimization.global_batch_size": 24, "optimization.micro_batch": 1, "optimization.warmup": 0,
    "optimization.learning_rate": 1e-4, "optimization.schedule": "constant", "data.packing": False, "evaluation.every": 20_000,
    "evaluation.generations": 0, "checkpointing.every": 5, "data.eval": 0, "tracking": [],
}  # fmt: skip

# How long Ray Train waits for a group of the old size before it starts a smaller one (30 s elsewhere): ranks start fast here.
ELASTIC = {"workers": [1, 3], "environment": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6"}}


def losses(folder: RunFolder) -> dict[int, float]:
    rows = map(json.loads, folder.metrics.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what()}")
        time.sleep(0.2)


def wait_for_world(folder: RunFolder, world: int, steps: int = 2) -> None:
    """Until an attempt with `world` ranks has done `steps` steps that none did before it."""

    def there() -> bool:
        state = api.current_state(folder)
        found = record.read(folder)
        assert not state.ended, json.dumps({k: found[k] for k in ("state", "error", "attempts")}, indent=1)
        last = found["attempts"][-1] if found["attempts"] else {}
        done = max((attempt["last_step"] or 0 for attempt in found["attempts"][:-1]), default=0)
        return last.get("world") == world and found["step"] >= max(done, last["first_step"]) + steps

    wait_for(there, 400, lambda: f"{world} ranks; {json.dumps(record.read(folder), indent=1)}")


def rank_process(folder: RunFolder, rank: int) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.cmdline()[-2:] == ["trebuchet.launcher.worker", str(folder.root)]
            if ours and process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"no process of rank {rank}")


def test_resized_up_and_down_with_a_lost_rank_between(
    ray_cluster: Path,
    with_settings: Callable[..., str],
    tiny_config: Config,
    session: Callable[..., Session],
    tmp_path: Path,
) -> None:
    """1 rank, then 2, one of them killed, then 1 as soon as they have begun again: the losses of the run that nobody disturbed. (1, 3 and 2
    ranks: benchmarks/ray.py.)"""
    name = ray_cluster.stem
    clusters.resize(name, 1)
    run = RunFolder(
        api.submit(tiny_config(LONG, output=str(tmp_path / "run")), cluster=with_settings(**ELASTIC)).folder
    )
    wait_for_world(run, 1)
    clusters.resize(name, 2)
    wait_for_world(run, 2)
    rank_process(run, 1).kill()
    lost_at = len(record.read(run)["attempts"])
    wait_for(lambda: len(record.read(run)["attempts"]) > lost_at, 120, lambda: "the next attempt")
    clusters.resize(name, 1)
    wait_for_world(run, 1)
    api.cancel(str(run.root))
    lines = list(logs.lines(run, follow=True))
    found = record.read(run)
    assert found["state"] == "CANCELLED", json.dumps(found, indent=1)
    assert {line[:4] for line in lines if line.startswith("[")} >= {"[0] "}
    worlds = [attempt["world"] for attempt in found["attempts"]]
    assert worlds[0] == 1 and 2 in worlds and worlds[-1] == 1, worlds
    kinds = [attempt.get("kind") for attempt in found["attempts"]]
    assert "resized" in kinds and "node" in kinds, kinds
    for before, after in zip(found["attempts"], found["attempts"][1:], strict=False):
        assert before["last_step"] - 5 <= after["first_step"] <= before["last_step"]  # one checkpoint interval at most
    seen = losses(run)
    assert list(seen) == list(range(1, found["step"] + 1))
    whole = session(LONG | {"optimization.micro_batch": 4, "optimization.max_steps": found["step"]})
    assert whole.run()
    assert seen == pytest.approx(losses(whole.runtime.folder), rel=1e-5)  # sums over 1 and 2 ranks round differently
    assert cluster_folder(name).token.stat().st_mode & 0o777 == 0o600
