"""The trials of a sweep as one array job: one sbatch call, `%parallel` of them at a time, each task a run like any other.

A task keeps its own record, requeues itself after preemption and failures (attempt.py), and stops when its folder says so. Left
out: what the trials are (launcher/sweep.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..launcher import record
from ..launcher.errors import SchedulerRefused
from ..launcher.job_state import JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from ..launcher.sweep_space import ranges
from . import sbatch, scheduler, states

if TYPE_CHECKING:
    from ..launcher.sweep import SweepFolder

SHAPE = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "environment")


def preview_trials(sweep: SweepFolder, plans: Sequence[Plan], parallel: int) -> str:
    return render(sweep, dict(enumerate(plans)), parallel)


def render(sweep: SweepFolder, plans: dict[int, Plan], parallel: int) -> str:
    """The script of the array. Raises SchedulerRefused when the trials are not of one shape: an array has one."""
    specs = {number: scheduler.job_spec(plan, RunFolder(sweep.root)) for number, plan in plans.items()}
    first = next(iter(specs))
    for number, spec in specs.items():
        differing = [key for key in SHAPE if getattr(spec, key) != getattr(specs[first], key)]
        if differing:
            what = ", ".join(f"{key} {getattr(spec, key)} and {getattr(specs[first], key)}" for key in differing)
            raise SchedulerRefused(
                f"trials {number:03d} and {first:03d} need jobs of different shape ({what}), and one array has one shape; sweep keys that "
                "leave the number of ranks alone, or make two sweeps."
            )
    spec = specs[first].model_copy(update={"warning_s": max(spec.warning_s for spec in specs.values())})
    array = sbatch.Array(ranges(sorted(plans)), parallel)
    return sbatch.render(spec, scheduler.site_of(plans[first]), sys.executable, array=array)


def run_trials(sweep: SweepFolder, numbers: Sequence[int]) -> str:
    """Writes SWEEP/job.sh and gives it to sbatch. Raises SchedulerRefused with sbatch's words."""
    facts = sweep.facts()
    trials = {number: sweep.trial(number) for number in numbers}
    plans = {n: Plan.model_validate_json(trial.plan.read_text(encoding="utf-8")) for n, trial in trials.items()}
    script = render(sweep, plans, facts["parallel"])
    refuse_too_many(max(numbers))
    record.write_atomically(sweep.script, script)
    sweep.stop.unlink(missing_ok=True)
    for trial in trials.values():
        trial.stop.unlink(missing_ok=True)
        if record.read(trial)["attempts"] or record.read(trial)["state"] != JobState.PENDING:  # else it says so already
            record.update(trial, state=JobState.PENDING.value, exit_code=None, error=None)
    answer = states.call("sbatch", "--parsable", sweep.script.name, cwd=sweep.root)
    handle = f"slurm://{facts['cluster']}/{answer.strip().partition(';')[0]}"
    for number, trial in trials.items():
        record.update(trial, submitted=f"{handle}_{number}")
    at_a_time = min(facts["parallel"], len(trials))
    return f"{len(trials)} trials are {handle}, {at_a_time} at a time; watch them with `trebuchet status {sweep.root}`"


def refuse_too_many(largest: int) -> None:
    limit = states.configuration().get("MaxArraySize", "")
    if limit.isdigit() and largest >= int(limit):
        raise SchedulerRefused(
            f"the largest array of this site has {int(limit) - 1} as its last number (MaxArraySize), and the sweep goes to {largest}; "
            "set sweep.trials lower."
        )


def cancel_trials(sweep: SweepFolder, folders: Sequence[RunFolder]) -> str:
    """Tasks that wait leave the queue with one call for each array; those that run find the file RUN/stop after their step."""
    arrays = {scheduler.job_id(record.read(f)["submitted"]).partition("_")[0] for f in folders}
    if arrays:
        states.call("scancel", "--state=PENDING", *sorted(arrays))
        scheduler.reconcile(folders)
    running = sum(record.read(folder)["state"] == JobState.RUNNING for folder in folders)
    return f"{len(folders) - running} trials were waiting and are taken from the queue, {running} save a checkpoint and stop"
