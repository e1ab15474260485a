"""A sweep of a tiny model on a real Ray cluster: poor trials end early, a driver that is killed loses nothing, nodes are given back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher import cli, record
from trebuchet.launcher.sweep import SweepFolder, open_sweep
from trebuchet.ray_cluster import clusters, rest
from trebuchet.ray_cluster.state import ClusterFolder, cluster_folder

from .test_runs import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
Config = Callable[..., dict[str, Any]]
RATES = [1e-3, 3e-3, 1e-9, 3e-9]  # two that learn and two that cannot


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


def groups_of(folder: ClusterFolder) -> list[dict[str, Any]]:
    """Placement groups that hold resources, as Ray's own state API lists them."""
    found = rest.of_cluster(folder).ask("/api/v0/placement_groups?detail=1&limit=1000")["data"]["result"]["result"]
    return [group for group in found if group["state"] == "CREATED"]


def test_poor_trials_end_early_a_killed_driver_loses_nothing_and_nodes_are_given_back(
    ray_cluster: Path,
    with_settings: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {
        "optimization.max_steps": 60, "optimization.warmup": 0, "evaluation.every": 0.1, "evaluation.generations": 0, "tracking": [],
        "checkpointing.every": 0.1,
    }  # fmt: skip
    config = tiny_config(changes, output=str(tmp_path / "sweep"))
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"choice": RATES}},
        "method": "grid",
        "parallel": 2,
        "stopping": {"name": "asha", "grace": 0.2, "factor": 2},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    name = ray_cluster.stem
    clusters.resize(name, 3, at_most=True)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--cluster", with_settings()]) == 0
    folder = open_sweep(str(tmp_path / "sweep"))
    assert folder is not None
    first = folder.trial(0)
    wait_for(lambda: record.read(first)["step"] >= 12, 400, lambda: str(table(folder, capsys)))
    rank = next(p for p in watchers(folder) if p.cmdline()[-2:] == ["trebuchet.launcher.worker", str(first.root)])
    rank.kill()
    wait_for(
        lambda: any(record.read(t)["state"] == "SUCCEEDED" for t in folder.trials()),
        400,
        lambda: str(table(folder, capsys)),
    )
    driver = driver_of(folder)
    os.kill(driver.pid, signal.SIGKILL)
    wait_for(lambda: not watchers(folder), 60, lambda: f"trials of a dead driver to end: {watchers(folder)}")
    there = cluster_folder(name)
    wait_for(lambda: not groups_of(there), 30, lambda: f"places of a dead driver: {groups_of(there)}")
    wait_for(lambda: not clusters.nodes(there), 90, lambda: f"idle nodes to end: {clusters.nodes(there)}")
    kept = {
        t.root.name: (t.model / "model.safetensors").stat().st_mtime_ns
        for t in folder.trials()
        if record.read(t)["state"] == "SUCCEEDED"
    }
    wait_for(
        lambda: table(folder, capsys)["state"] not in ("PENDING", "RUNNING"), 60, lambda: str(table(folder, capsys))
    )

    assert cli.main(["resume", str(folder.root)]) == 0
    wait_for(
        lambda: table(folder, capsys)["state"] not in ("PENDING", "RUNNING"), 400, lambda: str(table(folder, capsys))
    )
    found = table(folder, capsys)
    assert found["state"] == "SUCCEEDED", found
    assert {
        t: (folder.root / "trials" / t / "model" / "model.safetensors").stat().st_mtime_ns for t in kept
    } == kept  # not run again
    early = [row["trial"] for row in found["trials"] if row["stopped_early"]]
    # Which ones depends on who came first to each rung: a trial that learns may meet only a better one there.
    assert early and found["best"] in {"000", "001"} - set(early), found
    lost, after = record.read(first)["attempts"][:2]
    assert lost["kind"] == "node" and after["first_step"] >= 12 - 6, record.read(first)[
        "attempts"
    ]  # from its checkpoint
