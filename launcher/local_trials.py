"""Trials of a sweep on this machine: one after the other, in the foreground, each as `trebuchet run` runs it.

The first Ctrl+C lets the running trial save and starts no other. Left out: several at a time; they would share the cores or the
GPU that the plan of each counts on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import local, record
from .job_state import JobState
from .plan import Plan
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .sweep import SweepFolder


def preview_trials(sweep: SweepFolder, plans: Sequence[Plan], parallel: int) -> str:
    """The script of each trial under its name."""
    scripts = (local.preview(plan, sweep.trial(number)) for number, plan in enumerate(plans))
    return "\n".join(f"# trial {number:03d}\n{script}" for number, script in enumerate(scripts))


def run_trials(sweep: SweepFolder, numbers: Sequence[int]) -> str:
    """Returns when all have ended, or when one was stopped by the user."""
    sweep.stop.unlink(missing_ok=True)
    ended: dict[str, int] = {}
    for done, number in enumerate(numbers):
        folder = sweep.trial(number)
        print(f"trial {folder.root.name} ({done + 1} of {len(numbers)})", file=sys.stderr, flush=True)
        plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
        local.execute(folder, plan)
        state = record.read(folder)["state"]
        ended[state] = ended.get(state, 0) + 1
        if state == JobState.CANCELLED or sweep.stop.exists():
            break
    return ", ".join(f"{count} {state}" for state, count in ended.items())


def cancel_trials(sweep: SweepFolder, folders: Sequence[RunFolder]) -> str:
    """The loop in `run_trials` looks for the file after every trial, the ranks after every step."""
    return "will save a checkpoint at the end of this step and start no other trial"
