"""Two clusters of one machine; a head that is lost with a run on it. Both are files of cluster_configs/, started as they are."""

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
SHORT = {"optimization.max_steps": 20, "optimization.global_batch_size": 8}
Config = Callable[..., dict[str, Any]]


@pytest.fixture
def ray_local(ray_starts: None) -> Iterator[str]:
    """By its name alone, so the file in cluster_configs/ as it is."""
    name = "ray-local"
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


def gone(those: list[psutil.Process]) -> bool:
    return not [p for p in those if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_two_clusters_keep_apart_and_a_run_outlives_its_head(
    ray_local: str, ray_cluster: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two clusters on one machine takes its own token and no other, and not to have one is no way in. Every process of the head of
    one is killed as a run trains: the record says what happened and how to go on, the next `up` ends what was left, and the run ends on
    the new head, from its checkpoint. (That nodes which lose their head end by themselves: tests/slurm/test_ray_nodes.py.) After `down`
    nothing of it is left, and the other is as it was."""
    folder, other = cluster_folder(ray_local), cluster_folder(ray_cluster.stem)
    clusters.resize(ray_local, 1)  # it comes up beside what follows
    capsys.readouterr()
    assert cli.main(["cluster", "status", ray_local, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["up"]
    for token in (other.token, None):
        with pytest.raises(SchedulerRefused, match=r"40[13]"):
            rest.Dashboard("wrong", folder.read()["dashboard"], token).nodes()
    assert cli.main(["cluster", "up", ray_local]) == 2 and "is up already" in capsys.readouterr().err

    run = RunFolder(api.submit(tiny_config(LONG | SHORT, output=str(tmp_path / "run")), cluster=ray_local).folder)
    wait_for(lambda: record.read(run)["step"] >= 7, 400, lambda: f"step 7: {record.read(run)}")
    head = psutil.Process(json.loads((folder.root / "head.json").read_text())["pid"])
    supervisor = psutil.Process(json.loads((folder.root / "supervisor.json").read_text())["pid"])
    before = processes(folder)
    assert len(before) > 4  # head, its monitor, its agents, the node
    for process in [supervisor, head, *head.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert cli.main(["status", str(run.root)]) == 0
    shown = capsys.readouterr().out
    assert "NODE_FAIL" in shown and f"trebuchet resume {run.root}" in shown
    assert cli.main(["cluster", "up", ray_local]) == 0
    assert gone(before)
    clusters.resize(ray_local, 1)
    assert cli.main(["resume", str(run.root)]) == 0
    wait_for(lambda: api.current_state(run).ended, 400, lambda: f"the end: {record.read(run)}")
    found = record.read(run)
    assert (found["state"], found["step"], run.model.is_dir()) == ("SUCCEEDED", 20, True), found
    assert found["attempts"][0]["state"] == "NODE_FAIL" and found["attempts"][-1]["first_step"] >= 5
    before = processes(folder)
    assert cli.main(["cluster", "down", ray_local]) == 0
    assert gone(before) and not folder.root.exists()
    assert rest.of_cluster(other).nodes()
