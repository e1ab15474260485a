"""The cluster files that are shipped, started as they are; a head that is lost with a run on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from trebuchet.launcher import api, cli, record
from trebuchet.launcher.errors import SchedulerRefused
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.ray_cluster import clusters, rest
from trebuchet.ray_cluster.state import ClusterFolder, cluster_folder

from .test_runs import LONG, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
Config = Callable[..., dict[str, Any]]


@pytest.fixture(params=["ray-autoscaling"])
def shipped(ray_starts: None, request: pytest.FixtureRequest) -> Iterator[str]:
    yield from started(request.param)


@pytest.fixture
def ray_local(ray_starts: None) -> Iterator[str]:
    yield from started("ray-local")


def started(name: str) -> Iterator[str]:
    """By its name alone, so the file in cluster_configs/ as it is."""
    assert cli.main(["cluster", "up", name]) == 0
    try:
        yield name
    finally:
        if cluster_folder(name).exists:
            clusters.down(name, lambda line: None)


def processes(folder: ClusterFolder) -> list[psutil.Process]:
    """Every process of a cluster: head, nodes and what they started hold its folder or its scratch in their environment or words."""
    marks = [str(folder.root)]
    with contextlib.suppress(Exception):
        marks.append(folder.read()["scratch"])
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline()) + " " + process.environ().get("RAY_AUTH_TOKEN_PATH", "")
            if any(mark in words for mark in marks):
                found.append(process)
    return found


def test_the_autoscaling_file_starts_as_it_is_beside_another_and_leaves_nothing(
    shipped: str, ray_cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two clusters on one machine: each takes its own token and no other, and not to have one is no way in."""
    capsys.readouterr()
    assert cli.main(["cluster", "status", shipped, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["up"] and found["nodes"] == [] and (found["least"], found["most"]) == (0, 4)
    folder = cluster_folder(shipped)
    other = cluster_folder(ray_cluster.stem)
    for token in (other.token, None):
        with pytest.raises(SchedulerRefused, match=r"40[13]"):
            rest.Dashboard("wrong", folder.read()["dashboard"], token).nodes()
    before = processes(folder)
    assert len(before) > 3  # head, its monitor, its agents
    assert cli.main(["cluster", "up", shipped]) == 2 and "is up already" in capsys.readouterr().err
    assert cli.main(["cluster", "down", shipped]) == 0
    assert not [p for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] and not folder.root.exists()
    assert rest.of_cluster(other).nodes()  # the other one is as it was


def test_a_run_outlives_its_head(
    ray_local: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every process of the head is killed as a run trains. Its node notices and ends, the record says what happened and how to go on,
    and on the next head the run goes on from its checkpoint."""
    folder = cluster_folder(ray_local)
    run = RunFolder(api.submit(tiny_config(LONG, output=str(tmp_path / "run")), cluster=ray_local).folder)
    wait_for(lambda: record.read(run)["step"] >= 12, 400, lambda: f"step 12: {record.read(run)}")
    head = psutil.Process(json.loads((folder.root / "head.json").read_text())["pid"])
    supervisor = psutil.Process(json.loads((folder.root / "supervisor.json").read_text())["pid"])
    everything = processes(folder)
    for process in [supervisor, head, *head.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert cli.main(["status", str(run.root)]) == 0
    shown = capsys.readouterr().out
    assert "NODE_FAIL" in shown and f"trebuchet resume {run.root}" in shown
    psutil.wait_procs(everything, timeout=90)
    assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    reached = record.read(run)["step"]
    assert cli.main(["cluster", "up", ray_local]) == 0
    assert cli.main(["resume", str(run.root)]) == 0
    wait_for(lambda: record.read(run)["step"] > reached + 2, 400, lambda: f"more steps: {record.read(run)}")
    attempts = record.read(run)["attempts"]
    assert attempts[0]["state"] == "NODE_FAIL" and attempts[-1]["first_step"] >= 10 - 5
    api.cancel(str(run.root))
    wait_for(lambda: api.current_state(run).ended, 100, lambda: f"the end: {record.read(run)}")
    assert record.read(run)["state"] == "CANCELLED"
