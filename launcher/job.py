"""What is to be started, where and with what environment, for any scheduler; and what is known of it afterwards.

A `JobSpec` knows no scheduler: local.py, slurm and Ray each turn it into their own text. Left out: secrets. A job's environment
holds settings only; tokens are found on the machine that runs.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .job_state import JobState

__all__ = ["JobHandle", "JobSpec", "JobState"]


class JobSpec(BaseModel):
    """One job: `module` is run by `python -m` on every task with `arguments`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    run_folder: Path
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None = None
    warning_s: int = 120  # how long before the end of its time the job is told to save


class JobHandle(BaseModel):
    """`local://HOST/PID`, `slurm://CLUSTER/JOBID`, `ray://…`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    handle: str
    folder: Path
