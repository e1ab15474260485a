"""The wish to stop, as a signal that this process was sent. Taken from the first moment on, granted at a step boundary.

SIGTERM is what schedulers send before they take a node back, SIGUSR1 what a job asks for before its time ends. Importing this
loads nothing, so that a signal which comes while torch is being imported is a wish and not the end.
"""

from __future__ import annotations

import signal
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_noted: list[int] = []


def listen() -> None:
    """From here on a stop signal is noted and nothing else happens. Only in a process's main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def wished() -> int | None:
    """The first stop signal that came, or None."""
    return _noted[0] if _noted else None


def _note(number: int, frame: Any) -> None:
    _noted.append(number)
