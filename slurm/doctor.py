"""`trebuchet doctor --cluster`: a job of a minute that asks the nodes about themselves, and the wait for its answer.

Left out: the questions (training/allocation.py), and what the answer looks like on a screen (launcher/doctor.py).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..launcher.errors import JobFailed
from ..launcher.job import JobSpec
from ..launcher.run_folder import SCHEDULER_LOG
from . import sbatch, states
from .site import build_site

LONGEST_S = 30.0


def examine(name: str, settings: dict[str, Any], nodes: int, tasks: int, gpus: int) -> dict[str, Any]:
    """The report of `tasks` ranks on each of `nodes` nodes. Raises JobFailed with the end of the log when none comes.

    The job's folder is made in the working directory, which must be on the shared file system, as runs are.
    """
    folder = Path(tempfile.mkdtemp(prefix=".trebuchet-doctor-", dir=Path.cwd()))
    (folder / "logs").mkdir()
    spec = JobSpec(
        name="trebuchet-doctor",
        run_folder=folder,
        module="trebuchet.training.allocation",
        arguments=(str(folder),),
        environment={"OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        nodes=nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
    )
    site = build_site({**settings, "time": "10", "requeue": False}, name)
    (folder / "job.sh").write_text(sbatch.render(spec, site, sys.executable, recorded=False), encoding="utf-8")
    job = states.call("sbatch", "--parsable", "job.sh", cwd=folder).strip().partition(";")[0]
    try:
        wait(job)
    except KeyboardInterrupt:
        states.call("scancel", job)
        raise
    report = folder / "report.json"
    if not report.exists():
        log = folder / SCHEDULER_LOG
        said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        tail = "".join(f"\n  {line}" for line in said[-8:])
        raise JobFailed(f"job {job} ended without a report. The end of {log}:{tail}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return found


def wait(job: str) -> None:
    """Until the job has ended; asks ever more rarely."""
    delay = 0.5
    while True:
        state = states.states([job]).get(job)
        if state is None or state.ended:
            return
        time.sleep(delay)
        delay = min(delay * 1.5, LONGEST_S)
