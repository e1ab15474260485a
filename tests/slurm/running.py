"""What tests do with runs on the Slurm of cluster.py: submit them, wait for a step, find a rank's process."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import psutil
from trebuchet.launcher import api, logs, record
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import RunFolder

from .cluster import SlurmCluster, wait_for


def losses(folder: RunFolder) -> dict[int, float]:
    rows = map(json.loads, folder.metrics.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def finish(folder: RunFolder) -> list[str]:
    return list(logs.lines(folder, follow=True))


def said(folder: RunFolder) -> str:
    log = folder.logs / "slurm.log"
    return f"{json.dumps(record.read(folder), indent=1)}\n{log.read_text() if log.exists() else 'no log'}"


def wait_for_step(folder: RunFolder, step: int, attempt: int) -> None:
    """Until `attempt` (counted from 1) has done `step` steps."""

    def there() -> bool:
        found = record.read(folder)
        assert not JobState(found["state"]).ended, said(folder)
        return len(found["attempts"]) >= attempt and found["state"] == "RUNNING" and found["step"] >= step

    wait_for(there, 150, lambda: f"step {step} of attempt {attempt}; {said(folder)}")


def rank_process(folder: RunFolder, rank: int) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.cmdline()[-2:] == ["trebuchet.launcher.worker", str(folder.root)]
            if ours and process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"no process of rank {rank}")


def submit(config: dict[str, Any], cluster: str) -> RunFolder:
    return RunFolder(api.submit(config, cluster=cluster).folder)


def run_job(run: RunFolder) -> str:
    return str(record.read(run)["submitted"]).rpartition("/")[2]


def submissions(slurm: SlurmCluster) -> int:
    """REQUEST_SUBMIT_BATCH_JOB messages that the controller has had."""
    hit = re.search(r"REQUEST_SUBMIT_BATCH_JOB\s+\(\s*\d+\)\s+count:(\d+)", slurm.ask("sdiag"))
    return int(hit[1]) if hit else 0
