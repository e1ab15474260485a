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
from ..launcher.job import JobSpec, JobState
from ..launcher.run_folder import SCHEDULER_LOG
from . import classify, sbatch, states
from .site import build_site

POLL_S, LONGEST_S = 0.2, 30.0
PATIENCE_S = 10.0  # in the queue, before a word is said about it


def examine(name: str, settings: dict[str, Any], nodes: int, tasks: int, gpus: int) -> dict[str, Any]:
    """The report of `tasks` ranks on each of `nodes` nodes. Raises JobFailed with the end of the log when none comes.

    The job's folder is made in the working directory, which must be on the shared file system, as runs are.
    """
    folder = Path(tempfile.mkdtemp(prefix=".trebuchet-doctor-", dir=Path.cwd()))
    (folder / "logs").mkdir()
    spec = JobSpec(
        name="trebuchet-doctor",
        run_folder=folder,
        module="trebuchet.training.doctor_job",
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
        found = wait(job, folder)
    except KeyboardInterrupt:
        states.call("scancel", job)
        raise
    if found is None:
        tail = "".join(f"\n  {line}" for line in said(folder).splitlines()[-8:])
        raise JobFailed(f"job {job} ended without a report. The end of {folder / SCHEDULER_LOG}:{tail}")
    if found["problems"]:  # a node that does not answer would hold the job until the controller gives it up
        states.call("scancel", "--quiet", job)
    shutil.rmtree(folder, ignore_errors=True)  # a rank that was late may still write there
    return found


def wait(job: str, folder: Path) -> dict[str, Any] | None:
    """The report, as soon as it is there, or what srun says when it could not start the ranks of a node; None when the job ends
    without either. Looks at the files often, and asks Slurm ever more rarely."""
    ask_at, delay, ended = 0.0, 0.5, False
    quiet_until = time.monotonic() + PATIENCE_S
    while True:
        report = folder / "report.json"
        if report.exists():
            found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            return found
        failed = classify.LAUNCH.findall(said(folder))
        if failed:
            return {"problems": [f"{node}: Slurm could not start its ranks: {how}" for node, how in failed]}
        if ended:
            return None
        if time.monotonic() >= ask_at:
            state = states.states([job]).get(job)
            ended = state is None or state.ended  # and the files are looked at once more
            if state == JobState.PENDING and time.monotonic() > quiet_until:
                quiet_until = float("inf")
                print(
                    f"job {job} waits in the queue for these nodes: {states.reason(job)}; Ctrl+C gives up",
                    file=sys.stderr,
                )
            ask_at, delay = time.monotonic() + delay, min(delay * 1.5, LONGEST_S)
        if not ended:
            time.sleep(POLL_S)


def said(folder: Path) -> str:
    log = folder / SCHEDULER_LOG
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
