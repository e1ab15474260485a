"""Trials of a sweep on this machine: one after the other, in the foreground, each as `trebuchet run` runs it.

The first Ctrl+C lets the running trial save and starts no other. Left out: several at a time; they would share the cores or the
GPU that the plan of each counts on.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import local, record, sweep_budget, sweep_search, sweep_text
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
    search = sweep.facts()["method"] == "optuna"
    with sweep_budget.enforced(sweep.root):
        for done, number in enumerate(numbers):
            folder = sweep.trial(number)
            print(f"trial {folder.root.name} ({done + 1} of {len(numbers)})", file=sys.stderr, flush=True)
            if search and not sweep_search.decide(sweep, number):
                continue
            local.execute(folder, Plan.model_validate_json(folder.plan.read_text(encoding="utf-8")))
            if done + 1 < len(numbers):  # else the table of results follows
                print(sweep_text.status(sweep_text.table(sweep)), file=sys.stderr, flush=True)
            if record.read(folder)["state"] == JobState.CANCELLED or sweep.stop.exists():
                break
    ended = Counter(record.read(sweep.trial(number))["state"] for number in numbers)
    return ", ".join(f"{count} {state}" for state, count in ended.items())


def cancel_trials(sweep: SweepFolder, folders: Sequence[RunFolder]) -> str:
    """The loop in `run_trials` looks for the file after every trial, the ranks after every step."""
    return "will save a checkpoint at the end of this step and start no other trial"
