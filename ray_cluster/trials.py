"""The trials of a sweep on a Ray cluster: one Ray job whose driver (tuning.py) starts each trial where there is room for it.

A trial has the fewest GPUs of one node that its plan fits on, so that as many run side by side as the cluster holds. Left out:
trials over several nodes, which are runs for `submit`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..launcher import record
from ..launcher.cluster import Cluster
from ..launcher.job_state import JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from ..launcher.sweep_space import ranges
from . import scheduler

if TYPE_CHECKING:
    from ..launcher.sweep import SweepFolder


def shaped(cluster: Cluster, decide: Callable[[Cluster], Plan]) -> Plan:
    """The plan of one trial: on one node, with 1, 2, 4, … of its GPUs, the first number that fits; else the plan that does not."""
    group = cluster.groups[0]
    count = 1
    while True:
        gpus = min(count, group.gpus_per_node)
        decided = decide(
            cluster.model_copy(update={"groups": (group.model_copy(update={"nodes": 1, "gpus_per_node": gpus}),)})
        )
        if decided.feasible or gpus >= group.gpus_per_node:
            return decided
        count *= 2


def preview_trials(sweep: SweepFolder, plans: Sequence[Plan], parallel: int) -> str:
    """Ray's own command for the same job, and what each trial takes of a node."""
    lines = [f"# trial {number:03d}: {resources(plan)}" for number, plan in enumerate(plans)]
    return "\n".join(["#!/bin/sh", *lines, f"ray job submit --no-wait -- {entrypoint(sweep, range(len(plans)))}", ""])


def run_trials(sweep: SweepFolder, numbers: Sequence[int]) -> str:
    """Hands the driver in; returns at once."""
    sweep.stop.unlink(missing_ok=True)
    plan = Plan.model_validate_json(sweep.trial(numbers[0]).plan.read_text(encoding="utf-8"))
    job = f"{sweep.root.name}-{os.urandom(4).hex()}"
    handle = f"ray://{plan.cluster.name}/{job}"
    for number in numbers:
        trial = sweep.trial(number)
        trial.stop.unlink(missing_ok=True)
        record.update(trial, state=JobState.PENDING.value, exit_code=None, error=None, submitted=handle)
    environment = scheduler.job_spec(plan, sweep.trial(numbers[0])).environment
    scheduler.dashboard_of(plan.cluster).submit(
        entrypoint(sweep, numbers), job, environment, {"sweep": str(sweep.root)}
    )
    return f"{len(numbers)} trials are {handle}; watch them with `trebuchet status {shlex.quote(str(sweep.root))}`"


def cancel_trials(sweep: SweepFolder, folders: Sequence[RunFolder]) -> str:
    """The driver starts no trial of a sweep that is to stop; ranks look for RUN/stop after every step."""
    return "will save a checkpoint at the end of their step and start no other trial"


def entrypoint(sweep: SweepFolder, numbers: Sequence[int]) -> str:
    return shlex.join([sys.executable, "-m", f"{__package__}.tuning", str(sweep.root), ranges(sorted(numbers))])


def resources(plan: Plan) -> dict[str, float]:
    """What one trial takes: all of its ranks on one node."""
    assert plan.chosen is not None
    one = scheduler.resources_of(plan)
    return {
        key: value if key.startswith("accelerator_type") else value * plan.chosen.ranks for key, value in one.items()
    }
