"""The states of a job, whatever the scheduler.

A file of its own without pydantic: what keeps the record around every attempt of a Slurm job starts in a twentieth of a second.
"""

from __future__ import annotations

import enum


class JobState(enum.StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    PREEMPTED = "PREEMPTED"
    NODE_FAIL = "NODE_FAIL"

    @property
    def ended(self) -> bool:
        return self not in (JobState.PENDING, JobState.RUNNING)
