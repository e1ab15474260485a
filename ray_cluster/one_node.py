"""A trial whose ranks are on one node: watched as on any machine, and started again for what another start may cure.

    python -m trebuchet.ray_cluster.one_node RUN

The classes of failures and how often each is forgiven are those of a run on Ray (ranks.py). Ray starts this again, on another node,
when the node is lost; the attempt that nobody closed is closed here. SIGUSR1 says that the node is taken back (tuning.py sends it): the
ranks save at the end of their step, and the trial waits for its next node. Left out: trials over several nodes (driver.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from ..launcher import local, record
from ..launcher.job import JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from . import scheduler
from .ranks import first_hang, in_vain, kind_of, saved_step

NODE_VARIABLE = "TREBUCHET_RAY_NODE"  # set by tuning.py: Ray's id of the node


class TakenBack(Exception):
    """The ranks have saved, and are not to be started again on this node."""


def main(run: str) -> int:
    folder = RunFolder(Path(run))
    told: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: tell_ranks(folder, told))
    plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
    restarts = scheduler.settings_of(plan).restarts
    if not close_lost(folder, restarts):
        return 1

    def worth(outcome: dict[str, Any]) -> bool:
        if told and give_back(folder, outcome):
            raise TakenBack
        return again(folder, outcome, restarts)

    try:
        with alone_on(gpus_of(os.environ)):
            return local.execute(folder, plan, direct=True, again=worth)
    except TakenBack:
        return 1


def gpus_of(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that Ray gave to this trial, each by a name that no other GPU of this machine has, whichever Ray node it is part of."""
    node = environment.get(NODE_VARIABLE, "")
    return sorted(f"{node}-{gpu}" for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu)


@contextlib.contextmanager
def alone_on(gpus: list[str]) -> Iterator[None]:
    """Waits for the GPUs. Ray gives those of a trial that Tune has ended to the next at once, and the one that ended is still saving:
    two models would share the memory. The kernel gives a lock back with the process that has it."""
    with contextlib.ExitStack() as stack:
        for gpu in gpus:
            name = f"trebuchet-{os.getuid()}-{gpu.replace(os.sep, '-')}.lock"
            file = os.open(
                Path(tempfile.gettempdir()) / name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"the last trial on GPU {gpu} is still saving; this one starts after it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tell_ranks(folder: RunFolder, told: list[int]) -> None:
    """By signal and not by RUN/stop, which is the user's own wish."""
    told.append(signal.SIGUSR1)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-2:] == ["trebuchet.launcher.worker", str(folder.root)]:
                process.send_signal(signal.SIGUSR1)


def give_back(folder: RunFolder, outcome: dict[str, Any]) -> bool:
    """Closes an attempt whose node is taken back: saved, or ended before it could listen. False when it ended in another way, or when
    the user wanted it to."""
    kind = kind_of(outcome) if folder.outcome.exists() else "node"
    if kind not in ("stopped", "node") or outcome["asked"]:
        return False
    note(folder, "drained")
    reason = (
        "the node is taken back: saved, and goes on with another" if kind == "stopped" else "the node is taken back"
    )
    record.end_attempt(folder, JobState.PREEMPTED, 1, reason, goes_on=True)
    return True


def close_lost(folder: RunFolder, restarts: int) -> bool:
    """Closes an attempt whose node, or whose watcher there, is gone. False when that was once too often; the record then says so."""
    attempts = record.read(folder)["attempts"]
    if not attempts or attempts[-1]["ended"] is not None:
        return True
    note(folder, "node")
    wasted = in_vain(record.read(folder)["attempts"])
    reason = "the trial's node, or the process that watched it there, was lost"
    if wasted > restarts:
        reason = f"{wasted} failures in a row without a new checkpoint: {reason}"
    record.end_attempt(folder, JobState.NODE_FAIL, 1, reason, goes_on=wasted <= restarts)
    return wasted <= restarts


def again(folder: RunFolder, outcome: dict[str, Any], restarts: int) -> bool:
    """Whether a failure is worth the same plan once more: a rank that was lost or ended without a word, and the first hang."""
    kind = kind_of(outcome) if folder.outcome.exists() else "node"
    worth = kind == "node" or (kind == "hang" and first_hang(folder))
    note(folder, kind)
    return worth and in_vain(record.read(folder)["attempts"]) <= restarts


def note(folder: RunFolder, kind: str) -> None:
    first = record.read(folder)["attempts"][-1]["first_step"]
    record.update(folder, attempt={"kind": kind, "kept": saved_step(folder) > first})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
