"""Runs of a tiny model on a real Slurm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api, logs, record
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import RunFolder

from .cluster import SlurmCluster

pytestmark = pytest.mark.slow


def losses(folder: RunFolder) -> dict[int, float]:
    rows = map(json.loads, folder.metrics.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def finish(folder: RunFolder) -> list[str]:
    return list(logs.lines(folder, follow=True))


def test_submitted_followed_to_its_end(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    handle = api.submit(
        tiny_config({"optimization.max_steps": 4}, output=str(tmp_path / "run")), cluster=cluster_file()
    )
    folder = RunFolder(handle.folder)
    finish(folder)
    found = record.read(folder)
    assert found["state"] == JobState.SUCCEEDED, (found, (folder.root / "logs/slurm.log").read_text())
    assert len(losses(folder)) == 4
