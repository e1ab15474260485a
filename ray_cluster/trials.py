"""The trials of a sweep on a Ray cluster: one Ray job whose driver (tuning.py) starts each trial where there is room for it.

A trial has the fewest GPUs that its plan fits on: a share of one node, or whole nodes, so that as many run side by side as the cluster
holds. On one node its ranks are one bundle of a placement group and start as on any machine; over several nodes they are a Ray Train
run of their own (driver.py), whose placement group has one bundle for each rank.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..launcher import record
from ..launcher.cluster import Cluster, NodeGroup
from ..launcher.errors import ClusterError
from ..launcher.job_state import JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from ..launcher.sweep_space import ranges
from . import clusters, scheduler

if TYPE_CHECKING:
    from ..launcher.sweep import SweepFolder


def shaped(cluster: Cluster, decide: Callable[[Cluster], Plan], nodes: int | None = None) -> Plan:
    """The plan of one trial with 1, 2, 4, … GPUs of a node, then with 2, 4, … whole nodes: the first that fits, else the plan that does
    not. A share of a node counts on that share of its cores and memory, because others have the rest. `nodes`: exactly so many."""
    group = cluster.groups[0]
    most = clusters.most_nodes(cluster, clusters.of_ray(cluster))
    if nodes is not None and nodes > most:
        raise ClusterError(f"sweep.nodes is {nodes}, and {cluster.name} has at most {most}.")
    sizes = [share(group, n) for n in doubled(group.gpus_per_node or 1)] if nodes is None else []
    sizes += [group.model_copy(update={"nodes": n}) for n in (doubled(most)[1:] if nodes is None else [nodes])]
    for size in sizes:
        decided = decide(cluster.model_copy(update={"groups": (size,)}))
        if decided.feasible:
            break
    # With the cluster as it is: what a rank takes of a node does not depend on how much of it the trial has.
    return decided.model_copy(update={"cluster": cluster})


def share(group: NodeGroup, gpus: int) -> NodeGroup:
    """A node with so many of its GPUs, or the whole node where it has none."""
    part = gpus / group.gpus_per_node if group.gpus_per_node else 1.0
    change = {"nodes": 1, "gpus_per_node": gpus if group.gpus_per_node else 0, "cores": max(1, int(group.cores * part))}
    memory = {key: getattr(group, key) * part for key in ("host_memory_gib", "host_reserved_gib")}
    return group.model_copy(update=change | memory)


def doubled(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    found, count = [], 1
    while count < most:
        found.append(count)
        count *= 2
    return [*found, most]


def nodes_of(plan: Plan) -> int:
    """How many nodes the ranks of one trial need."""
    assert plan.chosen is not None
    return -(-plan.chosen.ranks // scheduler.ranks_per_node(plan))


def at_once(plan: Plan) -> int:
    """How many such trials the cluster holds when it has all of its nodes."""
    assert plan.chosen is not None
    most = clusters.most_nodes(plan.cluster, clusters.of_ray(plan.cluster))
    if nodes_of(plan) > 1:
        return max(1, most // nodes_of(plan))
    return most * max(1, scheduler.ranks_per_node(plan) // plan.chosen.ranks)


def preview_trials(sweep: SweepFolder, plans: Sequence[Plan], parallel: int) -> str:
    """Ray's own command for the same job, and what each trial takes of a node."""
    lines = [f"# trial {number:03d}: {bundles(plan)}" for number, plan in enumerate(plans)]
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


def bundles(plan: Plan) -> list[dict[str, float]]:
    """The bundles of a trial's placement group: one for all ranks of one node, or one for each rank over several."""
    assert plan.chosen is not None
    one = scheduler.resources_of(plan)
    if nodes_of(plan) > 1:
        return [one] * plan.chosen.ranks
    ranks = plan.chosen.ranks
    return [{key: value if key.startswith("accelerator_type") else value * ranks for key, value in one.items()}]
