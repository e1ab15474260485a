"""What Slurm says of jobs: one question for any number of them, answered in our states.

sacct where accounting is on; else squeue, which knows a finished job for MinJobAge (five minutes unless the site says
otherwise), and after that the file of jobcomp/filetxt where it can be read. Left out: how often to ask; that is the
caller's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..launcher.errors import SchedulerRefused
from ..launcher.job_state import JobState

_WAITING = "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD SPECIAL_EXIT"
_RUNNING = "RUNNING COMPLETING STAGE_OUT SIGNALING STOPPED SUSPENDED RESIZING POWER_UP_NODE"
_NODE = "NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL"
# slurm.h's job states, with the flags that squeue prints in their place.
STATES: dict[str, JobState] = {
    **dict.fromkeys(_WAITING.split(), JobState.PENDING),
    **dict.fromkeys(_RUNNING.split(), JobState.RUNNING),
    **dict.fromkeys(_NODE.split(), JobState.NODE_FAIL),
    "COMPLETED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "CANCELLED": JobState.CANCELLED,
    "REVOKED": JobState.CANCELLED,
    "TIMEOUT": JobState.TIMEOUT,
    "DEADLINE": JobState.TIMEOUT,
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "PREEMPTED": JobState.PREEMPTED,
}


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """State by job id; a job that Slurm does not know any more is missing. Raises SchedulerRefused when Slurm does
    not answer."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    found = _sacct(wanted) if has_accounting() else {}
    if len(found) < len(wanted):  # sacct has a job only once it may start: not while it is held (seen with 22.05)
        found = _squeue(wanted) | found
    missing = [job for job in wanted if job not in found]
    if missing and not has_accounting():
        found |= _jobcomp(missing)
    return found


def to_state(word: str) -> JobState:
    """`CANCELLED by 1000` and `NODE_FAIL+` too. Raises SchedulerRefused for a word that no known Slurm prints."""
    name = word.split()[0].rstrip("+")
    if name not in STATES:
        raise SchedulerRefused(f"Slurm speaks of a state '{word}' that this version does not know.")
    return STATES[name]


def call(*command: str, cwd: Path | None = None) -> str:
    """Runs one of Slurm's programs. Raises SchedulerRefused with its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    except FileNotFoundError:
        raise SchedulerRefused(
            f"`{command[0]}` is not on this machine; submit from a login node of the cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerRefused(
            f"`{command[0]}` did not answer within two minutes; is the controller up? Try `sinfo`."
        ) from None
    if done.returncode != 0:
        said = " ".join(
            line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.strip().splitlines()
        )
        raise SchedulerRefused(f"{command[0]} refused: {said or f'exit {done.returncode}'}")
    return done.stdout


@cache
def configuration() -> dict[str, str]:
    """slurm.conf as the controller holds it."""
    lines = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def has_accounting() -> bool:
    return configuration().get("AccountingStorageType", "").endswith("slurmdbd")


def _sacct(jobs: list[str]) -> dict[str, JobState]:
    text = call(
        "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", ",".join(arrays(jobs)),
        "--format=JobID,JobIDRaw,State",
    )  # fmt: skip
    return _by_id(text, jobs)


def _squeue(jobs: list[str]) -> dict[str, JobState]:
    # Named jobs that are gone make squeue fail when they are the only ones; all of the user's are as cheap for the
    # controller.
    text = call("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%A|%T")
    return _by_id(text, jobs)


def _by_id(text: str, jobs: list[str]) -> dict[str, JobState]:
    """`ID|RAW ID|STATE` a line. A task of an array has both kinds, ARRAY_INDEX and a number of its own, and one of the tasks has the
    number of the whole array; jobs are asked for by the first kind."""
    wanted, found = set(jobs), {}
    for line in text.splitlines():
        name, _, rest = line.partition("|")
        raw, _, word = rest.partition("|")
        for job in [*tasks(name), *([raw] if "_" not in name else [])]:
            if job in wanted and word:
                found[job] = to_state(word)
    return found


def reason(job: str) -> str:
    """Why Slurm says that a job waits: `Resources`, `Priority`, or nodes that are down, by name."""
    try:
        return call("squeue", "--noheader", "--jobs", job, "--format=%r").strip() or "it has left the queue"
    except SchedulerRefused as error:
        return str(error)


def tasks(name: str) -> list[str]:
    """`12_[1-3,7%2]`, which is how waiting tasks are printed together, as 12_1, 12_2, 12_3 and 12_7; any other id as it is."""
    array, bracket, rest = name.partition("_[")
    if not bracket:
        return [name]
    out = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        last, _, step = last.partition(":")
        out += [f"{array}_{n}" for n in range(int(first), int(last or first) + 1, int(step or 1))]
    return out


def arrays(jobs: Iterable[str]) -> list[str]:
    """Job ids without the numbers of tasks, each once: a thousand tasks are one word on a command line."""
    return sorted({job.partition("_")[0] for job in jobs})


def _jobcomp(jobs: list[str]) -> dict[str, JobState]:
    """The last line of each job in the site's completion log; empty where there is none or it is not ours to read."""
    if not configuration().get("JobCompType", "").endswith("filetxt"):
        return {}
    try:
        lines = Path(configuration()["JobCompLoc"]).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        values = dict(word.partition("=")[::2] for word in line.split())
        if values.get("JobId") in jobs and "JobState" in values:
            found[values["JobId"]] = to_state(values["JobState"])
    return found
