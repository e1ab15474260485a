"""A sweep of a tiny model on a real Ray cluster: poor trials end early, a driver that is killed loses nothing, nodes are given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher import cli, record
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.sweep import SweepFolder, open_sweep
from trebuchet.ray_cluster import clusters, rest
from trebuchet.ray_cluster.state import ClusterFolder, authentication, cluster_folder

from .test_runs import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
Config = Callable[..., dict[str, Any]]
RATES = [1e-3, 1e-9, 3e-3]  # the second cannot learn


def table(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", "--json", str(folder.root)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def driver_of(folder: SweepFolder) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "trebuchet.ray_cluster.tuning" in words and str(folder.root) in words and "-m" in words:
            return process
    raise AssertionError("no driver")


def watchers(folder: SweepFolder) -> list[psutil.Process]:
    """Everything that trains for this sweep."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(folder.root / "trials")) for word in words):
            found.append(process)
    return found


def drain(there: ClusterFolder, trial: RunFolder, when: Callable[[], None]) -> None:
    """By Ray's own command, the node that a trial is on: what a scheduler does that wants it back. The command is loaded before `when`,
    which returns at the moment to do it."""
    on = next(p for p in psutil.process_iter() if str(trial.root) in p.cmdline()).environ()["RAY_CLOUD_INSTANCE_ID"]
    node = next(n["node_id"] for n in clusters.nodes(there) if n["name"] == on)
    words = [
        "drain-node",
        f"--address={there.read()['address']}",
        f"--node-id={node}",
        "--deadline-remaining-seconds=120",
    ]
    words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=wanted"]
    begin = "import sys; from ray.scripts.scripts import cli; input(); cli(sys.argv[1:])"
    environment = {**os.environ, **authentication(there.token)}
    with subprocess.Popen(
        [sys.executable, "-c", begin, *words], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        when()
        _, problem = command.communicate(b"\n", timeout=180)
    assert command.returncode == 0, problem.decode()


def groups_of(folder: ClusterFolder) -> list[dict[str, Any]]:
    """Placement groups that hold resources, as Ray's own state API lists them."""
    found = rest.of_cluster(folder).ask("/api/v0/placement_groups?detail=1&limit=1000")["data"]["result"]["result"]
    return [group for group in found if group["state"] == "CREATED"]


def test_trials_survive_lost_ranks_and_nodes_poor_ones_end_early_and_a_killed_driver_loses_nothing(
    ray_cluster: Path,
    with_settings: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two trials at a time. The node of the second is drained: it saves before and goes on with another, and is ended early. A rank of the
    first is killed. Then the driver is killed with -9: the third saves, and places and nodes are given back. `resume` ends it."""
    changes = {
        "optimization.max_steps": 150, "optimization.warmup": 0, "evaluation.every": 15, "evaluation.generations": 0, "tracking": [],
        "evaluation.forgetting": 0, "checkpointing.every": 15,
    }  # fmt: skip
    config = tiny_config(changes, output=str(tmp_path / "sweep"))
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"choice": RATES}},
        "method": "grid",
        "parallel": 2,
        "stopping": {"name": "asha", "grace": 0.25, "factor": 2},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    name = ray_cluster.stem
    clusters.resize(
        name, 2
    )  # they come up while the driver does; the third, and those after `resume`, when trials wait for them
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--cluster", with_settings()]) == 0
    folder = open_sweep(str(tmp_path / "sweep"))
    assert folder is not None
    first, second, third = folder.trials()
    there = cluster_folder(name)

    def shown() -> str:
        return str(table(folder, capsys))

    wait_for(lambda: record.read(second)["state"] == "RUNNING", 400, shown)
    clusters.resize(name, 3, at_most=True)
    drain(there, second, lambda: wait_for(lambda: record.read(second)["step"] >= 1, 400, shown))
    wait_for(lambda: record.read(first)["step"] >= 16, 400, shown)
    rank = next(p for p in watchers(folder) if p.cmdline()[-2:] == ["trebuchet.launcher.worker", str(first.root)])
    rank.kill()
    wait_for(lambda: bool(record.read(second).get("not_worth_it")), 400, shown)
    wait_for(lambda: record.read(first)["state"] == "SUCCEEDED", 400, shown)
    wait_for(lambda: record.read(third)["step"] >= 1, 400, shown)
    os.kill(driver_of(folder).pid, signal.SIGKILL)
    wait_for(lambda: not watchers(folder), 180, lambda: f"trials of a dead driver to end: {watchers(folder)}")
    wait_for(lambda: not groups_of(there), 60, lambda: f"places of a dead driver: {groups_of(there)}")
    wait_for(lambda: not clusters.nodes(there), 90, lambda: f"idle nodes to end: {clusters.nodes(there)}")
    kept = {
        t.root.name: (t.model / "model.safetensors").stat().st_mtime_ns
        for t in folder.trials()
        if record.read(t)["state"] == "SUCCEEDED"
    }
    wait_for(lambda: table(folder, capsys)["state"] not in ("PENDING", "RUNNING"), 180, shown)

    assert cli.main(["resume", str(folder.root)]) == 0
    wait_for(lambda: table(folder, capsys)["state"] not in ("PENDING", "RUNNING"), 400, shown)
    found = table(folder, capsys)
    assert found["state"] == "SUCCEEDED", found
    for trial, written_at in kept.items():  # not run again
        assert (folder.root / "trials" / trial / "model" / "model.safetensors").stat().st_mtime_ns == written_at
    rows = {row["trial"]: row for row in found["trials"]}
    assert rows["001"]["stopped_early"] and rows["001"]["state"] == "CANCELLED" and found["best"] in ("000", "002"), (
        found
    )
    lost, after = record.read(first)["attempts"][:2]
    assert lost["kind"] == "node" and after["first_step"] >= 15, record.read(first)["attempts"]  # from its checkpoint
    drained, after = record.read(second)["attempts"][:2]
    assert (drained["kind"], drained["state"]) == ("drained", "PREEMPTED"), record.read(second)["attempts"]
    assert after["first_step"] == drained["last_step"] > 0  # nothing is lost with a notice
    stopped, after = record.read(third)["attempts"][:2]
    assert stopped["state"] == "CANCELLED" and after["first_step"] == stopped["last_step"] > 0
