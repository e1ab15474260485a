"""Many calls of one Python function as one array job, by submitit: shards of data, evaluation of many checkpoints.

One sbatch call whatever the number of items, `%parallel` of them at a time, and one table of what came of each. Functions and items
travel as submitit sends them, pickled by the submitting user for the same user's jobs; use functions of modules, which pickle by
name. Left out: training runs, which keep a record and
requeue themselves (scheduler.py; many of them: trials.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launcher.errors import SchedulerRefused
from ..launcher.record import write_atomically
from . import states
from .site import Site

if TYPE_CHECKING:
    from submitit import Job

LONGEST_S = 10.0
LARGEST = 1000  # Slurm's MaxArraySize is 1001 unless the site says otherwise, and indices start at 0


def fan_out(
    function: Callable[[Any], Any], items: Sequence[Any], *, site: Site, folder: Path, name: str,
    parallel: int = 50, cpus: int = 1, gpus: int = 0,
) -> list[Job[Any]]:  # fmt: skip
    """Submits `function(item)` for every item, one task each, and returns at once; `folder` is on the shared file system.

    Raises SchedulerRefused with sbatch's words, and ValueError for more items than one array holds.
    """
    import submitit

    if not items or len(items) > LARGEST:
        raise ValueError(f"{len(items)} items; one array holds 1 to {LARGEST}. Several calls make several arrays.")
    executor = submitit.SlurmExecutor(folder=folder, python=site.python)
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
            *site.setup,
            *(f"module load {quote(module)}" for module in site.modules),
            "export SLURM_EXPORT_ENV=ALL",
            *(f"export {key}={quote(value)}" for key, value in sorted(site.environment.items())),
        ],
        "srun_args": list(site.srun),
    }
    raw = [line.removeprefix("--").partition("=") for line in site.extra]
    others: dict[str, Any] = {key: value if equals else True for key, equals, value in raw}
    others |= {"export": "NONE", **({"time": site.time} if site.time else {})}
    if site.reservation:
        others["reservation"] = site.reservation
    return {key: value for key, value in named.items() if value is not None} | {"additional_parameters": others}


def gather(jobs: Sequence[Job[Any]]) -> list[dict[str, Any]]:
    """Waits for all; one row per item, in order: index, job, result, and error (the last line of what went wrong) or None.

    Waiting is on the files that tasks leave, and on squeue for tasks that end without one: submitit itself asks sacct, which many
    small clusters do not have, and would wait for ever.
    """
    delay = 0.2
    while not all(job.paths.result_pickle.exists() for job in jobs):
        if not _alive(jobs):
            break
        time.sleep(delay)
        delay = min(delay * 1.5, LONGEST_S)
    return [_row(index, job) for index, job in enumerate(jobs)]


def _alive(jobs: Sequence[Job[Any]]) -> bool:
    """Whether Slurm still holds any task of the arrays, with one question."""
    text = states.call("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%T")
    known = dict(line.partition("|")[::2] for line in text.splitlines())
    return any(not states.to_state(known[job.job_id]).ended for job in jobs if job.job_id in known)


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
