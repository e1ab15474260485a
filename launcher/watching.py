"""The ranks of a local job while they run: interrupts of the user, and an end for ranks that outlive a failure of others.

Left out: starting them (local.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from .run_folder import RunFolder

POLL_S = 0.5
LINGER_S = 10.0  # from the first failure to the end of all ranks; longer than a rank needs to say what it was doing


def wait(folder: RunFolder, process: subprocess.Popen[bytes]) -> None:
    """Until all ranks have ended. Once one has left a failure, the others get LINGER_S: a rank that is stopped, or stuck in the
    kernel, does not hear the SIGTERM that accelerate sends it."""
    failed_at = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return
        if failed_at is None and folder.outcome.exists():
            outcome = json.loads(folder.outcome.read_text(encoding="utf-8"))
            failed_at = time.monotonic() if outcome["error"] else None
        if failed_at is not None and time.monotonic() - failed_at > LINGER_S:
            end(process.pid)


class Interrupts:
    """While the ranks run: the first SIGINT or SIGTERM asks them to save and stop, the second ends them."""

    def __init__(self, folder: RunFolder, process: subprocess.Popen[bytes]):
        self.folder, self.process, self.asked, self.ended = folder, process, False, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self.asked:
            self.asked = True
            self.folder.stop.touch()
            print("\nstopping after this step; a checkpoint will be saved. Ctrl+C again ends at once.", file=sys.stderr)
            return
        self.ended = True
        end(self.process.pid)


def end(pid: int) -> None:
    """Ends what `execute` started, at once: the ranks take SIGTERM as a wish for a checkpoint, and the user has said no to that.
    Every rank is in a process group of its own, so they are found as descendants, and before their parent is gone."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        for process in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
