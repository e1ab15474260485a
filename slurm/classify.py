"""Why an attempt ended and what follows: pure, from what the ranks left, what srun said and what Slurm knows.

    finished                     done
    asked to stop by the user    cancelled, kept as it is
    preempted, time limit        requeue, as often as it happens
    out of memory                requeue with the next lighter plan (launcher/retry.py), the global batch unchanged
    node, network, killed rank   requeue on other nodes where there are others, `restarts` times
    hang                         requeue once
    anything else                stop: it would fail again

Left out: doing it (attempt.py, and the job script, which calls scontrol).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from ..launcher.job_state import JobState

STOPPED = 75  # worker.STOPPED; not imported, so that this file does not depend on the worker
SIGNAL_SLACK_S = 90  # Slurm may send the warning up to 60 s early (man sbatch), and looks at limits every 30 s
IDLE_ATTEMPTS = 3  # attempts in a row that reached the time limit without one step kept

Kind = Literal[
    "finished", "user", "preempted", "time-limit", "oom", "host-oom", "node", "hang", "input", "program", "slurm"
]  # fmt: skip
OOM = re.compile(r"out of memory", re.I)
# The kernel by a cgroup, `Detected 1 oom_kill event in StepId=…`; Slurm itself, `StepId=7.0 exceeded memory limit (N > M)`.
HOST_OOM = re.compile(r"oom[-_]kill|Out Of Memory|exceeded (job |step )?memory limit", re.I)
HANG = re.compile(
    r"^hang:|watchdog caught collective operation timeout|timed out waiting|wait timeout|collective.* timed out", re.I
)
NODE = re.compile(
    r"\bNCCL\b|\bXid\b|uncorrectable ECC|fallen off the bus|no CUDA-capable device|CUDA-capable device.*busy|"
    r"connection (closed|reset|refused)|broken pipe|socket|unable to connect|another rank ended|stale file handle|input/output error",
    re.IGNORECASE,
)
# srun's own account, in the order in which tasks ended: `srun: error: n2: task 1: Killed`.
ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<task>\d+)[^:]*: (?P<how>.+)")
# A node went while it had ranks: `srun: error: Node failure on n4`. sinfo may not say so yet.
LOST = re.compile(r"srun: error: Node failure on (?P<nodes>\S+)")
# What a rank says that only waited for the one that ended (launcher/worker.py): its own node is in order.
ECHO = re.compile(r"another rank ended")
# The daemon of a node did not answer: `srun: error: Task launch for StepId=1.0 failed on node n2: Socket timed out on send/recv operation`.
LAUNCH = re.compile(r"srun: error: Task launch for \S+ failed on node (?P<node>[^\s:]+): (?P<how>.+)")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the script printed of `scontrol show job` and `sinfo` at the end of an attempt."""

    job: str
    state: str
    now: datetime
    end: datetime | None
    preempted: bool
    allocated: tuple[str, ...]
    excluded: str
    node_states: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`state` closes the attempt; `action` is the script's: requeue, avoid NODE, or exit CODE."""

    kind: Kind
    state: JobState
    action: Literal["requeue", "avoid", "exit", "leave"]
    reason: str | None
    node: str | None = None
    exit_code: int = 0


def read_facts(text: str) -> Facts:
    """Parses the output of the script's `facts`."""
    job = dict(re.findall(r"(\w+)=(\S+)", next((line for line in text.splitlines() if line.startswith("JobId=")), "")))
    marks = [line.split("=") for line in text.splitlines() if line.startswith(("Now=", "Allocated=", "Node="))]
    now = next((_time(mark[1]) for mark in marks if mark[0] == "Now"), None)
    return Facts(
        job=job.get("JobId", ""),
        state=job.get("JobState", ""),
        now=now or datetime.now(),
        end=_time(job.get("EndTime", "")),
        preempted=_time(job.get("PreemptTime", "")) is not None,
        allocated=tuple(mark[1] for mark in marks if mark[0] == "Allocated"),
        excluded="" if job.get("ExcNodeList") in (None, "(null)") else job["ExcNodeList"],
        node_states={mark[1]: mark[2] for mark in marks if mark[0] == "Node"},
    )


def classify(
    outcome: dict[str, Any] | None, status: int, said: str, facts: Facts, history: Sequence[dict[str, Any]],
    *, asked_to_stop: bool, warning_s: int, restarts: int, lighter: str | None, on_cpu: bool, kept: bool,
) -> Verdict:  # fmt: skip
    """`outcome`: the ranks' outcome.json; `status`: srun's exit code; `said`: the log of this attempt; `history`: the
    attempts before this one; `lighter`: what a next attempt would change after running out of memory, None when
    nothing is left;
    `on_cpu`: the model is in host memory; `kept`: whether this attempt moved the newest checkpoint."""
    code, error = (outcome["exit_code"], outcome["error"]) if outcome else (None, None)
    if code == 0 and status == 0:
        return Verdict(kind="finished", state=JobState.SUCCEEDED, action="exit", reason=None)
    if asked_to_stop and code == STOPPED:
        return Verdict(kind="user", state=JobState.CANCELLED, action="exit", reason=None)
    if facts.state not in ("RUNNING", ""):  # cancelled or requeued from outside; Slurm has already decided
        return Verdict(
            kind="slurm", state=JobState.PREEMPTED, action="leave", reason=f"Slurm took the job back ({facts.state})"
        )
    saved = "saved in time" if code == STOPPED else "before it could save"
    if facts.preempted:
        return Verdict(
            kind="preempted", state=JobState.PREEMPTED, action="requeue", reason=f"preempted by another job, {saved}"
        )
    near = facts.end is not None and facts.now >= facts.end - timedelta(seconds=warning_s + SIGNAL_SLACK_S)
    if near and (code == STOPPED or _by_signal(status)):
        return _time_limit(history, saved, kept)
    if code == STOPPED:
        return Verdict(
            kind="user", state=JobState.CANCELLED, action="exit", reason="a signal from outside asked it to stop"
        )
    if HOST_OOM.search(said) and not (error and OOM.search(error)):
        reason = "a process took more host memory than the job was given; raise slurm.memory, or lower data.max_length."
        return _out_of_memory("host-oom", reason, lighter if on_cpu else None)
    if error and OOM.search(error):
        return _out_of_memory("oom", error, lighter)
    return _failure(code, error, outcome.get("node") if outcome else None, status, said, facts, history, restarts)


def _time_limit(history: Sequence[dict[str, Any]], saved: str, kept: bool) -> Verdict:
    before = [a.get("kind") == "time-limit" and not a.get("kept") for a in history[-(IDLE_ATTEMPTS - 1) :]]
    if not kept and len(before) == IDLE_ATTEMPTS - 1 and all(before):
        reason = f"{IDLE_ATTEMPTS} attempts in a row reached the time limit without one step kept; raise slurm.time"
        return Verdict(kind="time-limit", state=JobState.TIMEOUT, action="exit", reason=reason, exit_code=1)
    return Verdict(kind="time-limit", state=JobState.TIMEOUT, action="requeue", reason=f"the time limit came, {saved}")


def _out_of_memory(kind: Kind, reason: str, lighter: str | None) -> Verdict:
    if lighter is not None:
        return Verdict(
            kind=kind,
            state=JobState.OUT_OF_MEMORY,
            action="requeue",
            reason=f"{reason} Goes on with {lighter}, and the same global batch.",
        )
    return Verdict(kind=kind, state=JobState.OUT_OF_MEMORY, action="exit", reason=reason, exit_code=1)


def _failure(
    code: int | None,
    error: str | None,
    named: str | None,
    status: int,
    said: str,
    facts: Facts,
    history: Sequence[dict[str, Any]],
    restarts: int,
) -> Verdict:
    first, launch = ENDED.search(said), LAUNCH.search(said)
    node = launch["node"] if launch else first["node"] if first else None
    who = f"rank {first['task']} on {node}: {first['how']}" if first else f"srun ended with {status}"
    if launch:  # the ranks that end then only echo it
        who = f"{node} started no rank: {launch['how']}"
    echo = f"{error or ''}\n{said}"
    killed = (
        first is not None
        and first["how"].startswith(("Killed", "Terminated", "Bus error", "Segmentation", "Aborted"))
        and code != 2
    )
    down = _down(facts, said)
    if not (launch or killed) and ECHO.search(error or echo) and (node := _silent(facts, said)):
        who = f"nothing was heard from {node}, and {who}"
    if error and HANG.search(error):
        again = not any(a.get("kind") == "hang" for a in history)
        reason = error if error.startswith("hang:") else f"the ranks waited for one that did not come ({who}): {error}"
        return Verdict(
            kind="hang", state=JobState.FAILED, action="requeue" if again else "exit", reason=reason, exit_code=1
        )
    if killed or launch or down or named or (code != 2 and NODE.search(error or echo)):
        reason = f"{next(iter(down.values()), who)}. {error or ''}".strip()
        if sum(a.get("kind") == "node" for a in history) >= restarts:
            return Verdict(
                kind="node",
                state=JobState.NODE_FAIL,
                action="exit",
                reason=f"{reason} It was the last of {restarts} restarts.",
                exit_code=1,
            )
        bad = next(iter(down), named or node)
        if bad and _others(facts, bad):
            return Verdict(
                kind="node",
                state=JobState.NODE_FAIL,
                action="avoid",
                reason=f"{reason} Goes on without {bad}.",
                node=bad,
            )
        return Verdict(kind="node", state=JobState.NODE_FAIL, action="requeue", reason=reason)
    kind: Kind = "input" if code == 2 else "program"
    return Verdict(
        kind=kind,
        state=JobState.FAILED,
        action="exit",
        reason=error or f"{who}; the log of the job says more",
        exit_code=code or status or 1,
    )


def _down(facts: Facts, said: str) -> dict[str, str]:
    """The job's nodes that are out of order, by what sinfo or srun says of them; the words for it."""
    found = {n: f"node {n} is {s}" for n in facts.allocated if is_gone(s := facts.node_states.get(n, ""))}
    lost = {name for match in LOST.finditer(said) for name in match["nodes"].split(",")}
    return found or {n: f"node {n} failed" for n in facts.allocated if n in lost}


def _silent(facts: Facts, said: str) -> str | None:
    """The one node of which srun has told no end of a rank, when others only missed somebody; None when it is not one."""
    told = {match["node"] for match in ENDED.finditer(said)}
    silent = [n for n in facts.allocated if n not in told]
    return silent[0] if len(silent) == 1 else None


def _others(facts: Facts, bad: str) -> bool:
    """Whether the partition has enough nodes in order without `bad` and those that were excluded before."""
    out = {bad, *facts.excluded.split(",")}
    fit = [n for n, state in facts.node_states.items() if n not in out and not is_gone(state)]
    return len(fit) >= len(facts.allocated)


def is_gone(state: str) -> bool:
    """Whether sinfo's short state (%t) is that of a node that takes no jobs; a star means that it does not answer."""
    return state.endswith("*") or state.startswith(("down", "drain", "drng", "fail", "unk", "maint", "inval"))


def _by_signal(status: int) -> bool:
    return status == 0 or status > 128


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
