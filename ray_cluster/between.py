"""A process between Ray's and the one that watches a trial, so that the watcher hears of its end.

    python -m trebuchet.ray_cluster.between COMMAND…

A process of Ray that exits ends its own children with SIGKILL (kill_child_processes_on_worker_exit, on by default), which nobody can
hear: the ranks of a trial that was stopped early, or whose driver was gone, went on unwatched. Ray does not look for grandchildren.
So the child that it finds is this one; when it is gone, however that came, the kernel sends the command SIGTERM, once, and the run
saves. The command has a session of its own, because Ray's process group is signalled too, and a second SIGTERM means "at once".
SIGUSR1 is handed on. Source: ray, doc/source/ray-core/user-spawn-processes.rst.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The command, with this module between it and the caller. SIGUSR1 is not heard, and ends nothing, until the command's program is
    ready for it: whoever sends it has to say it again."""
    words = [sys.executable, "-m", f"{__package__}.between", *command]
    return subprocess.Popen(words, env=environment, preexec_fn=_told_of_the_end_of(os.getpid()))


def main(command: Sequence[str]) -> int:
    """The exit code of the command; 1 when a signal ended it."""
    process = subprocess.Popen(command, preexec_fn=_told_of_the_end_of(os.getpid()), start_new_session=True)

    def hand_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    signal.signal(signal.SIGUSR1, hand_on)
    code = process.wait()
    return code if code >= 0 else 1


def _told_of_the_end_of(parent: int) -> Callable[[], None]:
    """In a child before its program: prctl(PR_SET_PDEATHSIG, SIGTERM)."""

    def prepare() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if os.getppid() != parent:  # gone before the kernel was asked
            os._exit(1)

    return prepare


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
