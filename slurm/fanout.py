"""Many calls of one Python function as one array job, by submitit: shards of data, evaluation of many checkpoints.

One sbatch call whatever the number of items, `%parallel` of them at a time, and one table of what came of each. Functions and items
travel as submitit sends them, pickled by the submitting user for the same user's jobs; use functions of modules, which pickle by
name. Left out: training runs, which keep a record and
requeue themselves (scheduler.py; many of them: trials.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launcher.cluster import Cluster
from ..launcher.errors import ClusterError, SchedulerRefused, UserError
from ..launcher.job_state import JobState
from ..launcher.record import write_atomically
from . import sbatch, states
from .scheduler import INHERITED
from .site import Site, build_site

if TYPE_CHECKING:
    from submitit import Job

CORES = 4  # of a task, at most: tokenizing uses several, and small tasks start sooner
POLL_S, LONGEST_S = 0.5, 10.0  # files are looked at often, the controller is asked ever more rarely
LARGEST = 1000  # Slurm's MaxArraySize is 1001 unless the site says otherwise, and indices start at 0


def fan_out(
    function: Callable[[Any], Any], items: Sequence[Any], *, site: Site, folder: Path, name: str,
    parallel: int = 50, cpus: int = 1, gpus: int = 0,
) -> list[Job[Any]]:  # fmt: skip
    """Submits `function(item)` for every item, one task each, and returns at once; `folder` is on the shared file system.

    Raises SchedulerRefused with sbatch's words, ClusterError for a site whose jobs run in containers, and ValueError for more items
    than one array holds.
    """
    import submitit

    if site.container is not None:
        raise ClusterError(
            "calls of a Python function do not run in containers; use slurm.venv or slurm.conda for them."
        )
    if not items or len(items) > LARGEST:
        raise ValueError(f"{len(items)} items; one array holds 1 to {LARGEST}. Several calls make several arrays.")
    own = (
        "python3" if site.venv or site.conda else None
    )  # of the environment that the job activates; else the one that submits
    executor = submitit.SlurmExecutor(folder=folder, python=site.python or own)
    executor.update_parameters(**parameters(site, name=name, parallel=parallel, cpus=cpus, gpus=gpus))
    try:
        return executor.map_array(function, items)
    except submitit.core.utils.FailedJobError as error:
        raise SchedulerRefused(f"sbatch refused: {' '.join(str(error).split())}") from None


def parameters(site: Site, *, name: str, parallel: int, cpus: int, gpus: int) -> dict[str, Any]:
    """The site's settings as submitit names them; those without a name of their own go to sbatch as they are."""
    from shlex import quote

    named = {
        "job_name": name,
        "partition": ",".join(site.partition) or None,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclude": ",".join(site.exclude) or None,
        "nodelist": ",".join(site.nodelist) or None,
        "mem": site.memory,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": site.cpus_per_task or cpus,
        "gpus_per_node": gpus if gpus and site.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if gpus and site.gpu_request == "gres" else None,
        "exclusive": site.exclusive or None,
        "array_parallelism": parallel,
        "stderr_to_stdout": True,
        "setup": [
            *sbatch.site_lines(site).splitlines(),
            "export SLURM_EXPORT_ENV=ALL",
            *(
                f"export {key}={quote(value)}"
                for key, value in sorted((sbatch.caches(site) | site.environment).items())
            ),
            *sbatch.secrets(site),
        ],
        "srun_args": list(site.srun),
    }
    raw = [line.removeprefix("--").partition("=") for line in site.extra]
    others: dict[str, Any] = {key: value if equals else True for key, equals, value in raw}
    others |= {"export": "NONE", **({"time": site.time} if site.time else {})}
    if site.reservation:
        others["reservation"] = site.reservation
    return {key: value for key, value in named.items() if value is not None} | {"additional_parameters": others}


def parts(
    function: Callable[[int], Any], count: int, cluster: Cluster, *, folder: Path, name: str, gpus: int = 0
) -> tuple[str, Callable[[], list[dict[str, Any]]]]:
    """Starts `function(0)` to `function(count - 1)` on the nodes of a cluster, as launcher/backends.py says of `parts`."""
    site, cores = build_site(cluster.slurm, cluster.name), cluster.groups[0].cores
    handed = {name: os.environ[name] for name in INHERITED if name in os.environ} | {"HF_HUB_OFFLINE": "1"}
    site = site.model_copy(update={"environment": handed | sbatch.caches(site) | site.environment})
    try:
        cpus = min(cores or 1, CORES)
        jobs = fan_out(function, range(count), site=site, folder=folder, name=name, cpus=cpus, gpus=gpus)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    except ImportError:
        raise UserError("parts as jobs of Slurm need submitit: pip install 'trebuchet[slurm]'.") from None
    array = jobs[0].job_id.partition("_")[0]

    def wait() -> list[dict[str, Any]]:
        try:
            return gather(jobs)
        except KeyboardInterrupt:
            states.call("scancel", array)
            raise

    return f"slurm://{cluster.name}/{array}", wait


def gather(jobs: Sequence[Job[Any]]) -> list[dict[str, Any]]:
    """Waits for all; one row per item, in order: index, job, result, and error (the last line of what went wrong) or None.

    Waiting is on the files that tasks leave, and on squeue for tasks that end without one: submitit itself asks sacct, which many
    small clusters do not have, and would wait for ever.
    """
    missing, ask_at, delay = list(jobs), 0.0, POLL_S
    while True:
        alive = True
        if time.monotonic() >= ask_at:  # before the files: a task that ends between the two has left its own
            alive = _alive(missing)
            delay = min(delay * 1.5, LONGEST_S)
            ask_at = time.monotonic() + delay
        missing = [job for job in missing if not job.paths.result_pickle.exists()]
        if not missing or not alive:
            break
        time.sleep(POLL_S)
    return [_row(index, job) for index, job in enumerate(jobs)]


def _alive(jobs: Sequence[Job[Any]]) -> bool:
    """Whether Slurm still holds any task of the arrays, with one question. A task that is preempted or loses its node is called so
    before Slurm puts it back into the queue: until Slurm has forgotten it, it may come again."""
    text = states.call("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%T")
    known = dict(line.partition("|")[::2] for line in text.splitlines())
    found = [states.to_state(known[job.job_id]) for job in jobs if job.job_id in known]
    return any(not state.ended or state in (JobState.PREEMPTED, JobState.NODE_FAIL) for state in found)


def _row(index: int, job: Job[Any]) -> dict[str, Any]:
    import submitit

    row: dict[str, Any] = {"index": index, "job": job.job_id, "result": None, "error": None}
    if not job.paths.result_pickle.exists():
        return row | {"error": f"ended without a result; see {job.paths.stdout}"}
    try:
        row["result"] = job.result()
    except submitit.core.utils.FailedJobError as error:
        trace = str(error).split("-" * 20)[1] if "-" * 20 in str(error) else str(error)
        row["error"] = trace.strip().strip("-").strip().splitlines()[-1]
    return row


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
