"""Slurm as a scheduler of runs: submit, reconcile the record with what Slurm knows, cancel. See launcher/backends.py.

The record of a run is kept by the job itself (attempt.py); what is asked of Slurm here is only whether a job that the
record believes alive still is. Left out: the script's text (sbatch.py) and what follows from a failure (classify.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..launcher import record
from ..launcher.cluster import Cluster
from ..launcher.errors import ClusterError, SchedulerRefused
from ..launcher.job import JobHandle, JobSpec, JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from . import doctor, inventory, sbatch, states
from .site import Site, build_site

SAVE_BYTES_PER_S = 200e6  # assumed until a save was measured: a slow shared file system
LEAST_WARNING_S = 60
# Where caches are is the user's word and no secret; nothing else of the submitting shell reaches the job.
INHERITED = ("HF_HOME", "HF_HUB_CACHE", "TREBUCHET_CACHE", "XDG_CACHE_HOME")


# States that a job passes through on its way back into the queue, and how long it may take (Slurm waits for the epilog and for
# nodes that do not answer: 7 s seen on an idle local controller).
PASSING = (JobState.NODE_FAIL, JobState.PREEMPTED)
SETTLE_S = 45.0


def check(plan: Plan) -> None:
    """The site's settings are right, the partition has the GPUs that the plan is for, and the model is fetched into the cache that the
    nodes will read."""
    site = site_of(plan)
    refuse_other_gpus(plan, site)
    folder = plan.model.source == "folder"
    if site.cache and not folder and os.environ.get("HF_HOME") != f"{site.cache}/huggingface":
        raise ClusterError(
            f"the nodes of {plan.cluster.name} read models from {site.cache}/huggingface, and this shell would fetch "
            f"them elsewhere: export HF_HOME={site.cache}/huggingface TREBUCHET_CACHE={site.cache}/trebuchet"
        )


def preview(plan: Plan, folder: RunFolder) -> str:
    return sbatch.render(job_spec(plan, folder), site_of(plan), sys.executable)


def submit(folder: RunFolder, plan: Plan) -> JobHandle:
    """Writes RUN/job.sh and gives it to sbatch from within the run folder. Raises SchedulerRefused with sbatch's
    words."""
    script = preview(plan, folder)
    folder.logs.mkdir(exist_ok=True)
    folder.stop.unlink(missing_ok=True)
    record.write_atomically(folder.script, script)
    record.update(folder, state=JobState.PENDING.value, exit_code=None, error=None)
    try:
        answer = states.call("sbatch", "--parsable", folder.script.name, cwd=folder.root)
    except SchedulerRefused as refused:
        record.update(folder, state=JobState.FAILED.value, exit_code=refused.exit_code, error=str(refused))
        raise
    handle = f"slurm://{plan.cluster.name}/{answer.strip().partition(';')[0]}"
    record.update(folder, submitted=handle)
    return JobHandle(run=folder.root.name, handle=handle, folder=folder.root)


def refuse_other_gpus(plan: Plan, site: Site) -> None:
    """See inventory.refuse_other_gpus. Where there is no Slurm to ask, only a dry run comes further."""
    gpu = plan.cluster.groups[0].gpu
    assert plan.chosen is not None
    named = site.gpu_type or site.constraint or site.nodelist
    if plan.chosen.device == "cuda" and gpu and site.partition and not named and shutil.which("scontrol"):
        inventory.refuse_other_gpus(site.partition, gpu, plan.cluster.name)


def reconcile(folders: Sequence[RunFolder]) -> None:
    """Closes the records of jobs that Slurm has ended without their script having its say, and marks those that wait
    again."""
    alive = {}
    for folder in folders:
        found = record.read(folder)
        if not JobState(found["state"]).ended and found["submitted"]:
            alive[folder] = job_id(found["submitted"])
    try:
        known = states.states(alive.values())
    except SchedulerRefused as problem:
        print(f"trebuchet: states are those of the records; {problem}", file=sys.stderr)
        return
    for folder, job in alive.items():
        found = record.read(folder)  # again: the job may have closed it while Slurm was asked
        if JobState(found["state"]).ended or job_id(found["submitted"]) != job:
            continue
        state = known.get(job)
        if state == JobState.PENDING and found["state"] == JobState.RUNNING:
            record.update(folder, state=state.value)
        elif state in PASSING and not settled(folder, found):
            continue
        elif state is None or state.ended:
            close(folder, found, job, state)
        if state not in PASSING and found.get("ended_since") is not None:
            record.update(folder, ended_since=None)


def settled(folder: RunFolder, found: dict[str, Any]) -> bool:
    """Whether Slurm has called the job ended for SETTLE_S: before it requeues one it calls it failed or preempted."""
    since = found.get("ended_since")
    if since is None:
        record.update(folder, ended_since=time.time())
    return since is not None and time.time() - since > SETTLE_S


def close(folder: RunFolder, found: dict[str, object], job: str, state: JobState | None) -> None:
    log = folder.scheduler_log
    where = f"what it said is in {log}" if log.exists() else "it left no log"
    if (
        state is None and folder.stop.exists()
    ):  # a task of an array that is cancelled as it waits leaves no trace in Slurm
        state = JobState.CANCELLED
    code: int = 130 if state == JobState.CANCELLED else 1
    if state == JobState.CANCELLED:
        error = None
    elif state is None:
        state, error = JobState.FAILED, f"Slurm does not know job {job} any more; {where}."
    elif state == JobState.SUCCEEDED:
        state, error = (
            JobState.FAILED,
            f"job {job} ended before the run did; {where}. Go on with `trebuchet resume {folder.root}`.",
        )
    else:
        error = f"Slurm ended job {job}: {state.value}; {where}."
    if found["attempts"] and found["attempts"][-1]["ended"] is None:  # type: ignore[index]
        record.end_attempt(folder, state, code, error)
    else:
        record.update(folder, state=state.value, exit_code=code, error=error)


def cancel(folder: RunFolder) -> str:
    """A job that waits is taken from the queue; one that runs saves first."""
    found = record.read(folder)
    folder.stop.touch()
    if found["state"] == JobState.PENDING:
        states.call("scancel", "--state=PENDING", job_id(found["submitted"]))
        reconcile([folder])
        if record.read(folder)["state"] == JobState.CANCELLED:
            return "was waiting and is taken from the queue"
    return "will save a checkpoint at the end of this step and stop"


def examine(cluster: Cluster) -> dict[str, Any]:
    """Every rank that a run on all of the cluster's nodes would have, asked together."""
    if len(cluster.groups) > 1:
        raise ClusterError(f"{cluster.name} has several kinds of nodes; give a cluster file with the one to ask.")
    group = cluster.groups[0]
    return doctor.examine(cluster.name, cluster.slurm, group.nodes, group.gpus_per_node or 1, group.gpus_per_node)


def job_id(handle: str) -> str:
    return handle.rpartition("/")[2]


def site_of(plan: Plan) -> Site:
    return build_site(plan.cluster.slurm, plan.cluster.name)


def job_spec(plan: Plan, folder: RunFolder) -> JobSpec:
    """One task per rank on every node of the plan's group."""
    chosen, group = plan.chosen, plan.cluster.groups[0]
    assert chosen is not None
    per_node = chosen.ranks // group.nodes
    environment = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",  # what is needed was fetched where there is a network
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_RESUME": "allow",  # a requeued attempt continues the same run of the tracker
        "WANDB_RUN_ID": run_id(folder),
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
    }
    cores = max(1, group.cores // max(per_node, group.gpus_per_node))
    environment["OMP_NUM_THREADS"] = str(cores)
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
        module="trebuchet.launcher.worker",
        arguments=(str(folder.root),),
        environment=environment,
        nodes=group.nodes,
        tasks_per_node=per_node,
        gpus_per_node=per_node if chosen.device == "cuda" else 0,
        cpus_per_task=cores,
        warning_s=warning_s(plan, folder),
    )


def warning_s(plan: Plan, folder: RunFolder) -> int:
    """Seconds that a save and the step before it may take: three times what was measured, else from the checkpoint's
    size."""
    try:
        found = json.loads(folder.record.read_text(encoding="utf-8")).get("save_s")
    except OSError:
        found = None
    if found is None:
        chosen = plan.chosen
        assert chosen is not None
        lora = plan.config.strategy.lora
        trained = plan.model.params if chosen.method == "full" else plan.model.lora_params(lora.r, lora.targets)
        found = trained * 12 / SAVE_BYTES_PER_S  # weights and two moments in fp32
    return min(65535, max(LEAST_WARNING_S, math.ceil(3 * found)))


def run_id(folder: RunFolder) -> str:
    """The same for every attempt of a run, and of letters that trackers take."""
    import hashlib

    name = re.sub(r"[^a-z0-9]+", "-", folder.root.name.lower()).strip("-")[:40] or "run"
    return f"{name}-{hashlib.sha256(str(folder.root).encode()).hexdigest()[:8]}"
