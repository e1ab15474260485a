"""Processes that outlive the command that started them: written down with their start time, found again, ended.

A number alone is not a process: it may have been given to another one in the meantime.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from ..launcher.record import write_atomically

TERM_S = 10.0  # a drained node ends in half a second; one that is not gone by then is ended for good


def write_process(file: Path, pid: int, **facts: Any) -> None:
    write_atomically(file, json.dumps({"pid": pid, "started": psutil.Process(pid).create_time(), **facts}))


def process_of(facts: dict[str, Any]) -> psutil.Process | None:
    """The process that was written down, if it still lives."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(facts["pid"], os.WNOHANG)  # a child of this process that has ended would stay a zombie
    try:
        process = psutil.Process(facts["pid"])
        alive = abs(process.create_time() - facts["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def end_process(facts: dict[str, Any], term_s: float = TERM_S) -> None:
    """SIGTERM, and after `term_s` SIGKILL to all that it started. Returns when it is gone."""
    process = process_of(facts)
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + term_s
    while time.monotonic() < deadline and process_of(facts) is not None:
        time.sleep(0.05)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=5)
