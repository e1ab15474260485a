"""This machine as a scheduler: `accelerate launch` with a config file in the run folder, watched until it ends.

The user can start the same by hand: `render` prints it. Ranks run in a session of their own, so Ctrl+C reaches only this process;
it asks the ranks to stop by a file, they save at the next step boundary. A second Ctrl+C ends them at once.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from . import first_failure, record, retry
from .cluster import Cluster
from .errors import ClusterError, JobFailed, SchedulerRefused
from .job import JobHandle, JobSpec, JobState
from .plan import Plan
from .run_folder import RunFolder
from .watching import Interrupts, wait

CLOCK_SLACK_S = 60.0  # a wall clock may be set while a job runs
Again = Callable[[dict[str, Any]], bool]
STOPPED = 75  # worker.STOPPED; not imported, so that this file does not depend on the worker


def job_spec(plan: Plan, folder: RunFolder, *, until: int | None = None) -> JobSpec:
    chosen = plan.chosen
    assert chosen is not None
    environment = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",  # everything was fetched before the ranks start
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if chosen.device == "cpu":
        environment |= cpu_environment(chosen.ranks)
    return JobSpec(
        name=folder.root.name,
        run_folder=folder.root,
        module="trebuchet.launcher.worker",
        arguments=(str(folder.root), *(() if until is None else ("--until", str(until)))),
        environment=environment,
        nodes=1,
        tasks_per_node=chosen.ranks,
        gpus_per_node=chosen.gpus,
    )


def cpu_environment(ranks: int) -> dict[str, str]:
    """What makes a CPU step fast and cannot be set once a process runs. glibc otherwise returns the memory of every large tensor
    to the kernel and pays a page fault for each 4 KiB when it comes back: 2 to 4 times the time of a step (measured, 135 M
    parameters, 2 cores)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // ranks)),
        "CUDA_VISIBLE_DEVICES": "",
    }


def accelerate_config(spec: JobSpec) -> str:
    """The file that `accelerate launch --config_file` reads."""
    several = spec.tasks_per_node > 1
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # accelerate 1.15 starts several ranks only as MULTI_GPU; on a machine without GPUs they come up as gloo ranks on CPU.
        "distributed_type": "MULTI_GPU" if several else "NO",
        "use_cpu": not several and spec.gpus_per_node == 0,
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": spec.tasks_per_node,
        "mixed_precision": "no",  # the loop's own autocast
    }
    if several:
        values |= {
            "main_process_ip": "127.0.0.1",
            "main_process_port": free_port(),
            "rdzv_backend": "static",
            "same_network": True,
        }
    return yaml.safe_dump(values, sort_keys=False)


def command(spec: JobSpec, *, direct: bool = False) -> list[str]:
    """`direct`: one rank without accelerate's launcher, which imports torch once more only to start it (about 4 s of two cores for
    each trial of a sweep)."""
    if direct and spec.tasks_per_node == 1:
        return [sys.executable, "-m", spec.module, *spec.arguments]
    config = str(RunFolder(spec.run_folder).accelerate)
    threads = spec.environment.get("OMP_NUM_THREADS", "1")  # named, or accelerate prints a paragraph about its default
    starter = [sys.executable, "-m", "trebuchet.launcher.first_failure", str(spec.run_folder)]
    launch = [*starter, "--quiet", "--config_file", config]
    return [*launch, "--num_cpu_threads_per_process", threads, "-m", spec.module, *spec.arguments]


def render(spec: JobSpec) -> str:
    """A shell script that starts the same job by hand, every word quoted."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.environment.items())]
    return "\n".join(["#!/bin/sh", *lines, "exec " + shlex.join(command(spec)), ""])


def check(plan: Plan) -> None:
    """Nothing to ask of this machine before a run is written."""


def preview(plan: Plan, folder: RunFolder) -> str:
    """The script of a plan."""
    return render(job_spec(plan, folder))


def execute(folder: RunFolder, plan: Plan, *, direct: bool = False, again: Again | None = None) -> int:
    """Runs the job in the foreground; returns the exit code, with the record closed. Out of memory, the ranks are started again
    with the next lighter plan, until one fits or none is left. `again` says of any other failure whether it is worth the same plan once
    more; without it none is.

    0 done, 1 failed, 2 bad input that only the ranks could see, 130 stopped by the user with a checkpoint saved.
    """
    while True:
        next_plan = retry.lighter(plan)
        how = retry.sentence(plan, next_plan) if next_plan else None
        code = attempt(folder, plan, direct=direct, again=again, out_of_memory=how)
        found = record.read(folder)
        if found["state"] == JobState.PENDING and found["attempts"][-1]["state"] != JobState.OUT_OF_MEMORY:
            continue  # `again` wants the same once more
        if found["state"] != JobState.PENDING or next_plan is None:
            return code
        record.write_atomically(folder.plan, next_plan.model_dump_json(indent=1) + "\n")
        print(how, file=sys.stderr)
        plan = next_plan


def attempt(
    folder: RunFolder, plan: Plan, *, until: int | None = None, direct: bool = False, again: Again | None = None,
    out_of_memory: str | None = None,
) -> int:  # fmt: skip
    """Starts the ranks once and waits for them; the exit code, with the attempt closed in the record. `until` ends the run after that
    step, without a checkpoint. `out_of_memory`: how the run goes on if that is how the attempt ends; None: it does not."""
    spec = job_spec(plan, folder, until=until)
    record.write_atomically(folder.accelerate, accelerate_config(spec))
    folder.logs.mkdir(exist_ok=True)
    if record.read(folder)["state"] != JobState.PENDING.value:  # else it may be a wish to cancel what was submitted
        folder.stop.unlink(missing_ok=True)
    for told in (folder.outcome, folder.first_failure):
        told.unlink(missing_ok=True)
    try:
        process = subprocess.Popen(
            command(spec, direct=direct), env={**os.environ, **spec.environment}, start_new_session=True
        )
    except OSError as error:
        raise SchedulerRefused(f"could not start the ranks: {error}") from None
    record.begin_attempt(folder, handle_of(os.getpid()), ranks=process.pid)
    with Interrupts(folder, process) as interrupts:
        wait(folder, process)
    otherwise = first_failure.without_a_word(folder, process.returncode)
    return close(folder, otherwise, ended_by_user=interrupts.ended, again=again, out_of_memory=out_of_memory)


def handle_of(pid: int) -> str:
    """A local job is known by the process that watches its ranks and closes its record."""
    return f"local://{platform.node()}/{pid}"


def close(
    folder: RunFolder, otherwise: str, *, ended_by_user: bool = False, again: Again | None = None,
    out_of_memory: str | None = None,
) -> int:  # fmt: skip
    """Closes the record by the outcome that the ranks left, or with the error `otherwise` when they left none; the exit code. `again`
    is asked of failures and of ranks that saved and stopped; `asked`: the user wanted it."""
    asked = ended_by_user or folder.stop.exists()
    folder.stop.unlink(missing_ok=True)
    outcome: dict[str, Any] = {"exit_code": 130 if ended_by_user else 1, "error": None if ended_by_user else otherwise}
    if folder.outcome.exists():
        outcome = json.loads(folder.outcome.read_text(encoding="utf-8"))
    code, error = outcome["exit_code"], first_failure.named(folder, outcome["error"])
    if code == 0:
        state = JobState.SUCCEEDED
    elif code in (STOPPED, 130):
        state, code = JobState.CANCELLED, 130
    elif error and error.startswith("out of memory"):
        state = JobState.OUT_OF_MEMORY
        if out_of_memory:
            record.end_attempt(folder, state, code, f"{error} {out_of_memory}", goes_on=True)
            return code
    else:
        state = JobState.FAILED
    may = state == JobState.FAILED or outcome["exit_code"] == STOPPED
    goes_on = may and again is not None and again({**outcome, "asked": asked})
    record.end_attempt(folder, state, code, error, goes_on=goes_on)
    return code


def alive(handle: str, since: str, *, also: int | None = None) -> bool:
    """Whether the process of a local handle, or `also`, lives, and is older than the time stamp `since` (a number that was given
    to another process in the meantime is not it). A job of another machine is believed to live: its record is all there is here."""
    host, _, pid = handle.removeprefix("local://").partition("/")
    if not handle.startswith("local://") or host != platform.node():
        return True
    return any(_lives(number, since) for number in (int(pid), also) if number)


def _lives(pid: int, since: str) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        started = process.create_time()
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and started <= datetime.fromisoformat(since).timestamp() + CLOCK_SLACK_S
        )
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def submit(folder: RunFolder, plan: Plan) -> JobHandle:
    """Starts the job in the background, watched by a process of its own, and returns at once."""
    folder.logs.mkdir(exist_ok=True)
    with (folder.logs / "launcher.log").open("ab") as log:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "trebuchet.launcher.local", str(folder.root)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    handle = handle_of(watcher.pid)
    record.update(folder, submitted=handle)
    return JobHandle(run=folder.root.name, handle=handle, folder=folder.root)


def cancel(folder: RunFolder) -> str:
    folder.stop.touch()  # the ranks look for it after every step
    return "will save a checkpoint at the end of this step and stop"


def examine(cluster: Cluster) -> dict[str, Any]:
    raise ClusterError(f"{cluster.name} is this machine: `trebuchet doctor` without --cluster looks at it.")


def reconcile(folders: Sequence[RunFolder]) -> None:
    """Closes the records of runs whose processes are gone, by what their ranks left."""
    for folder in folders:
        found = record.read(folder)
        if found["state"] == JobState.RUNNING:
            attempt = found["attempts"][-1]
            if not alive(attempt["handle"], attempt["started"], also=attempt["ranks"]):
                close(
                    folder,
                    "the launcher and its ranks ended without closing the record: killed, or the machine went down",
                )
            continue
        # Between submitting and the first attempt, or between two; what has begun by now says so itself.
        launcher = found["submitted"] or next((a["handle"] for a in found["attempts"][-1:]), None)
        gone = found["state"] == JobState.PENDING and launcher and not alive(launcher, found["created"])
        if gone and record.read(folder)["state"] == JobState.PENDING:
            why = "the launcher ended before it started the ranks"
            why += f"; see {folder.logs / 'launcher.log'}" if found["submitted"] else ""
            record.update(folder, state=JobState.FAILED.value, exit_code=1, error=why)


def main(run: str) -> int:
    """The watcher of `submit`."""
    folder = RunFolder(Path(run))
    try:
        return execute(folder, Plan.model_validate_json(folder.plan.read_text(encoding="utf-8")))
    except (JobFailed, SchedulerRefused) as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
