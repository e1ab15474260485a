"""Ray as a scheduler of runs: each attempt to finish a run is a Ray job, which outlives whoever handed it in. See launcher/backends.py.

The job's program is driver.py; it starts the ranks by Ray Train and keeps the record. Left out: clusters themselves (clusters.py).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..launcher import record
from ..launcher.cluster import Cluster
from ..launcher.errors import ClusterError, SchedulerRefused
from ..launcher.job import JobHandle, JobSpec, JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from ..launcher.sweep_budget import sweep_of
from . import clusters, rest
from .settings import RaySettings, ray_settings
from .state import cluster_folder

INHERITED = ("HF_HOME", "HF_HUB_CACHE", "TREBUCHET_CACHE", "XDG_CACHE_HOME", "PYTHONPATH")
# Ray Train's own times, for runs that are to lose seconds and not minutes: how often it looks at its workers, and how long it
# waits for a group of the old size before it starts one of the size that there is, how often it asks whether a node is drained.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


def shaped(cluster: Cluster, processes: int | None, decide: Callable[[Cluster], Plan]) -> Plan:
    """The plan of a run on this cluster. An elastic run is planned for its fewest ranks: what fits there fits on more."""
    settings = clusters.of_ray(cluster)
    if settings.ranks is None:
        return decide(cluster)
    least, most = settings.ranks
    group = cluster.groups[0]
    per_node = group.gpus_per_node or processes or 1
    if most > per_node * clusters.most_nodes(cluster, settings):
        raise ClusterError(
            f"{cluster.name}: ray.workers asks for up to {most} ranks, and {clusters.most_nodes(cluster, settings)} nodes "
            f"of {per_node} hold {per_node * clusters.most_nodes(cluster, settings)}."
        )
    if least > per_node and least % per_node:
        raise ClusterError(
            f"{cluster.name}: ray.workers begins at {least}, which is no multiple of {per_node} per node."
        )
    change: dict[str, Any] = {"nodes": max(1, least // per_node)}
    if group.gpus_per_node and least < per_node:
        change["gpus_per_node"] = least
    decided = decide(cluster.model_copy(update={"groups": (group.model_copy(update=change),)}))
    chosen, reasons = decided.chosen, decided.reasons
    if chosen is not None and settings.elastic:
        chosen = chosen.model_copy(update={"elastic": settings.elastic})
        reasons = (
            *reasons,
            f"elastic: {least} to {most} ranks, planned for {least}; the global batch stays the same at each",
        )
    return decided.model_copy(update={"cluster": cluster, "chosen": chosen, "reasons": reasons})


def check(plan: Plan) -> None:
    """The settings are right and the cluster is up."""
    dashboard_of(plan.cluster)


def preview(plan: Plan, folder: RunFolder) -> str:
    """What is handed in: a shell script that does the same with Ray's own command."""
    spec = job_spec(plan, folder)
    environment = json.dumps({"env_vars": spec.environment})
    return "\n".join(
        [
            "#!/bin/sh",
            f"# ranks: {ranks_text(plan)}; each with {json.dumps(resources_of(plan))}",
            f"ray job submit --no-wait --runtime-env-json={shlex.quote(environment)} -- {entrypoint(spec)}",
            "",
        ]
    )


def submit(folder: RunFolder, plan: Plan) -> JobHandle:
    """Hands the driver in and returns. Raises SchedulerRefused with the head's words."""
    dashboard = dashboard_of(plan.cluster)
    spec = job_spec(plan, folder)
    folder.logs.mkdir(exist_ok=True)
    folder.stop.unlink(missing_ok=True)
    job = f"{folder.root.name}-{os.urandom(4).hex()}"
    handle = f"ray://{plan.cluster.name}/{job}"
    record.update(folder, state=JobState.PENDING.value, exit_code=None, error=None, submitted=handle)
    try:
        dashboard.submit(entrypoint(spec), job, spec.environment, {"run": str(folder.root)})
    except (SchedulerRefused, ClusterError) as refused:
        record.update(folder, state=JobState.FAILED.value, exit_code=refused.exit_code, error=str(refused))
        raise
    return JobHandle(run=folder.root.name, handle=handle, folder=folder.root)


def reconcile(folders: Sequence[RunFolder]) -> None:
    """Closes the records of jobs that ended without their driver having its say. One question for each cluster."""
    by_cluster: dict[str, list[tuple[RunFolder, str]]] = {}
    for folder in folders:
        found = record.read(folder)
        if not JobState(found["state"]).ended and found["submitted"]:
            name, _, job = found["submitted"].removeprefix("ray://").partition("/")
            by_cluster.setdefault(name, []).append((folder, job))
    for those in by_cluster.values():
        plan = Plan.model_validate_json(those[0][0].plan.read_text(encoding="utf-8"))
        try:
            jobs = dashboard_of(plan.cluster).jobs()
        except (ClusterError, SchedulerRefused) as problem:
            if not gone(plan.cluster):
                print(f"trebuchet: states are those of the records; {problem}", file=sys.stderr)
                continue
            jobs = {}
        for folder, job in those:
            close_if_ended(folder, job, jobs.get(job))


def close_if_ended(folder: RunFolder, job: str, known: dict[str, Any] | None) -> None:
    if known is not None and known["status"] not in ("SUCCEEDED", "FAILED", "STOPPED"):
        return
    found = record.read(folder)  # again: the driver may have closed it while the head was asked
    if JobState(found["state"]).ended or not found["submitted"].endswith(f"/{job}"):
        return
    hint = f"Go on with `trebuchet resume {folder.root}`."
    if found.get("not_worth_it") or folder.stop.exists():  # it was to end, and nobody was left to say so
        state, code, error = JobState.CANCELLED, 130, None
    elif known is None:
        state, code, error = JobState.NODE_FAIL, 1, f"the Ray cluster's head is gone, and job {job} with it. {hint}"
    elif known["status"] == "STOPPED":
        state, code, error = JobState.CANCELLED, 130, None
    else:
        said = (known.get("message") or "").strip().splitlines()
        state, code, error = (
            JobState.FAILED,
            1,
            f"job {job} ended before the run did: {said[-1] if said else 'no word'}. {hint}",
        )
    if found["attempts"] and found["attempts"][-1]["ended"] is None:
        record.end_attempt(folder, state, code, error)
    else:
        record.update(folder, state=state.value, exit_code=code, error=error)


def cancel(folder: RunFolder) -> str:
    """A job whose ranks wait for nodes is stopped; one that runs saves first."""
    found = record.read(folder)
    folder.stop.touch()
    if found["state"] == JobState.PENDING and sweep_of(folder) is not None:  # its job is that of all trials
        return "will not train when its turn comes"
    if found["state"] == JobState.PENDING:
        plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
        dashboard_of(plan.cluster).stop(found["submitted"].rpartition("/")[2])
        return "was waiting for nodes and is stopped"
    return "will save a checkpoint at the end of this step and stop"


def examine(cluster: Cluster) -> dict[str, Any]:
    raise ClusterError(
        f"{cluster.name} is a Ray cluster: `trebuchet cluster status {cluster.name}` shows its nodes; each run examines its "
        "ranks before it loads the model."
    )


def dashboard_of(cluster: Cluster) -> rest.Dashboard:
    """Where jobs are handed in. Raises ClusterError for a cluster that is not up, with the command that starts it."""
    settings = clusters.of_ray(cluster)
    if settings.provider == "existing":
        token = Path(settings.token_file).expanduser() if settings.token_file else None
        return rest.Dashboard(cluster.name, str(settings.dashboard), token)
    folder = cluster_folder(cluster.name)
    if not folder.read()["ready"]:
        raise ClusterError(
            f"the Ray cluster {cluster.name} is still coming up; `trebuchet cluster status {cluster.name}`."
        )
    return rest.of_cluster(folder)


def gone(cluster: Cluster) -> bool:
    """Whether a cluster of ours has no head any more; one that others keep may just be out of reach."""
    if ray_settings(cluster.ray, cluster.name).provider == "existing":
        return False
    folder = cluster_folder(cluster.name)
    return not folder.exists or not clusters.alive(folder)


def entrypoint(spec: JobSpec) -> str:
    return shlex.join([sys.executable, "-m", spec.module, *spec.arguments])


def job_spec(plan: Plan, folder: RunFolder) -> JobSpec:
    chosen, group = plan.chosen, plan.cluster.groups[0]
    assert chosen is not None
    settings = ray_settings(plan.cluster.ray, plan.cluster.name)
    environment = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",  # what is needed was fetched where there is a network
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(cores_of_a_rank(plan)),
        **TRAIN_ENVIRONMENT,
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        **settings.environment,
    }
    if chosen.device == "cpu":
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TOP_PAD_": str(64 * 2**20),
            "MALLOC_TRIM_THRESHOLD_": str(2**40),
        }
    return JobSpec(
        name=folder.root.name,
        run_folder=folder.root,
        module=f"{__package__}.driver",
        arguments=(str(folder.root),),
        environment=environment,
        nodes=group.nodes,
        tasks_per_node=ranks_per_node(plan),
        gpus_per_node=group.gpus_per_node,
    )


def ranks_per_node(plan: Plan) -> int:
    return plan.cluster.groups[0].gpus_per_node or plan.config.cluster.processes or 1


def cores_of_a_rank(plan: Plan) -> int:
    return max(1, plan.cluster.groups[0].cores // ranks_per_node(plan))


def resources_of(plan: Plan) -> dict[str, float]:
    """Of one rank: its share of a node's cores and, where there are any, one GPU of the type that the plan was made for."""
    found: dict[str, float] = {"CPU": cores_of_a_rank(plan)}
    gpu = plan.cluster.groups[0].gpu
    if gpu is not None:
        found["GPU"] = 1
        if kind := clusters.accelerator(gpu):
            found[f"accelerator_type:{kind}"] = 0.001
    return found


def ranks_text(plan: Plan) -> str:
    assert plan.chosen is not None
    return "{} to {}".format(*plan.chosen.elastic) if plan.chosen.elastic else str(plan.chosen.ranks)


def settings_of(plan: Plan) -> RaySettings:
    return ray_settings(plan.cluster.ray, plan.cluster.name)
