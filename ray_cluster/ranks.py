"""One rank as Ray Train starts it: the same worker as everywhere, in a process of its own, told its rank by the environment.

A process of its own, because the worker takes signals (only a main thread can), sets what must be set before a process runs, and
may be ended by the C library; Ray's process then still has a word to say. The kernel ends it when Ray's process dies.

What a failure means is decided by its class: what another start may cure (a lost rank or node, a hang the first time) is raised,
and Ray Train starts the group again; the rest (wrong input, out of memory, a fault of the program) returns, and the driver closes
the run. When a node is about to be taken back (a drain: `ray drain-node`, a preempted Slurm job), all ranks save at the end of their
step and start again without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from ..launcher import record
from ..launcher.job import JobState
from ..launcher.run_folder import RunFolder
from ..slurm.classify import HANG, NODE, OOM

STOPPED = 75  # worker.STOPPED; not imported, so that this file does not depend on the worker
LOOK_S = 1.0
WORD_S = 30.0
PLANNED = ("resized", "drained")
Kind = Literal["done", "stopped", "input", "oom", "hang", "node", "program"]


class RankLost(RuntimeError):
    """A failure that another start may cure."""


def rank(config: dict[str, Any]) -> None:
    """Ray Train's function. Raises RankLost for what the group should be started again for."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    folder, context = RunFolder(Path(config["run"])), ray.train.get_context()
    mine, world = context.get_world_rank(), context.get_world_size()
    meeting = None
    if mine == 0:
        go_on = open_attempt(folder, config["handle"], world, config["restarts"])
        meeting = (ray.util.get_node_ip_address(), free_port(), go_on)
    host, port, go_on = broadcast_from_rank_zero(meeting)
    if not go_on:
        return
    environment = {
        **os.environ,
        "RANK": str(mine),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0"
        if config["gpu"]
        else str(context.get_local_rank()),  # Ray shows each rank its own GPU and no other
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "trebuchet.launcher.worker", config["run"]], env=environment, preexec_fn=_end_with_parent
    )
    code, drained = wait(process)
    if drained and not folder.stop.exists() and code == 0 and not finished(folder):
        raise RankLost(f"rank {mine} of {world} saved a checkpoint, because a node is taken back")
    if code == 0:
        return
    outcome = json.loads(folder.outcome.read_text(encoding="utf-8")) if folder.outcome.exists() else None
    kind = kind_of(outcome) if outcome else "node"
    if kind == "node" or code < 0 or (kind == "hang" and first_hang(folder)):
        raise RankLost(f"rank {mine} of {world} ended with {code}: {(outcome or {}).get('error') or 'no word'}")


def wait(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """The worker's exit code, and whether a node of the group is being drained; then the worker was asked to save and stop, and all
    ranks agree on the step (training/runtime.py). Ray's public question, `get_preemption_info`, is a barrier of all ranks and would
    wait for those whose worker has ended; what this rank has been told is in its context."""
    from ray.train.v2._internal.execution.context import get_train_context

    told, drained = get_train_context().preemption_context, False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(LOOK_S), drained
        if told.preemption_info is not None and not drained:
            drained = True
            process.send_signal(signal.SIGUSR1)


def finished(folder: RunFolder) -> bool:
    """Whether the run reached its end: the first rank's last word, waited for, because others end before it."""
    deadline = time.monotonic() + WORD_S
    while not folder.outcome.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return folder.outcome.exists() and json.loads(folder.outcome.read_text(encoding="utf-8"))["exit_code"] == 0


def kind_of(outcome: dict[str, Any]) -> Kind:
    """The class of what the ranks left behind, by the same words that Slurm's classes go by."""
    code, error = outcome["exit_code"], outcome["error"] or ""
    if code in (0, STOPPED):
        return "done" if code == 0 else "stopped"
    if code == 2:
        return "input"
    if OOM.search(error):
        return "oom"
    if HANG.search(error):
        return "hang"
    if outcome.get("node") or NODE.search(error) or "another rank ended" in error:
        return "node"
    return "program"


def open_attempt(folder: RunFolder, handle: str, world: int, restarts: int) -> bool:
    """By rank 0 before any rank starts: closes what the last group left open, opens this one. False when failures without a
    new checkpoint between them have used up the restarts; the outcome then says so."""
    found = record.read(folder)
    left = json.loads(folder.outcome.read_text(encoding="utf-8")) if folder.outcome.exists() else None
    if found["attempts"] and found["attempts"][-1]["ended"] is None:
        close_last(folder, found["attempts"][-1], left, world)
    folder.outcome.unlink(missing_ok=True)
    attempts = record.read(folder)["attempts"]
    wasted = in_vain(attempts)
    if wasted > restarts:
        error = f"{wasted} failures in a row without a new checkpoint: {attempts[-1]['reason']}"
        record.write_atomically(folder.outcome, json.dumps({"exit_code": 1, "error": error, "node": None}))
        return False
    record.begin_attempt(folder, handle, ranks=0)
    record.update(folder, attempt={"world": world, "first_step": saved_step(folder)})
    return True


def close_last(folder: RunFolder, last: dict[str, Any], left: dict[str, Any] | None, world: int) -> None:
    before = last.get("world")
    kind: str = kind_of(left) if left else "resized" if before != world else "node"
    if kind == "stopped":
        kind, left = "drained", None
    if kind == "node" and before != world:
        reason = f"a rank or its node was lost; goes on with {world} ranks instead of {before}"
    elif kind == "resized":
        reason = f"resized from {before} to {world} ranks"
    elif kind == "drained":
        reason = f"a node is taken back: saved, and goes on with {world} ranks after {before}"
    else:
        reason = (left or {}).get("error") or "a rank or its node was lost"
    state = {"resized": JobState.PREEMPTED, "drained": JobState.PREEMPTED, "node": JobState.NODE_FAIL}.get(
        kind, JobState.FAILED
    )
    record.update(folder, attempt={"kind": kind, "kept": saved_step(folder) > last["first_step"]})
    record.end_attempt(folder, state, 1, reason, goes_on=True)


def in_vain(attempts: list[dict[str, Any]]) -> int:
    """Failures at the end of the list with no checkpoint kept in any of them. A resize or a drain is no failure."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.get("kept") or attempt.get("kind") not in ("node", "hang", *PLANNED):
            break
        count += attempt.get("kind") not in PLANNED
    return count


def first_hang(folder: RunFolder) -> bool:
    return not any(a.get("kind") == "hang" for a in record.read(folder)["attempts"])


def saved_step(folder: RunFolder) -> int:
    """Of the newest checkpoint that was written to its end, by name; whether it is whole is the worker's question."""
    steps = [p.name.removeprefix("step-") for p in folder.checkpoints.glob("step-*") if (p / "manifest.json").exists()]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGKILL): with the thread of Ray's process that started it gone, a rank would train on unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
