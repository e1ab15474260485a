"""Ranks of one job end together: one that fails tells the others through the process group's store, and they leave their collectives.

A rank that runs out of memory alone cannot come back into a collective that the others are in; over gloo they would hear of it when
it exits, over NCCL not before a time-out. A thread on each rank looks for the word (anchored: three ranks gone 0.01 s after it, over
gloo, while their main threads sat in an all-reduce). Left out: ranks that are killed or hang (training/watchdog.py).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

KEY, HEARD = "trebuchet/ended", "trebuchet/heard"
POLL_S = 0.05
ANSWER_S = 2.0  # what a failing rank waits for the others to have heard it; its process may hold the store
GRACE_S = 0.3  # what the others wait after hearing, so that whoever started the ranks sees the failing one end first


class Together:
    def __init__(self, store: Any, rank: int, world: int, end: Callable[[int], Any] = os._exit):
        self.rank, self.world, self.end = rank, world, end
        self.store, self.polled = (
            store,
            store.clone(),
        )  # one connection a thread: a blocking get would hold the other up
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._poll, name="together", daemon=True)
        self.thread.start()

    def tell(self, reason: str) -> None:
        """This rank ends. Returns when the others have heard it, or after ANSWER_S."""
        self.stop()
        try:
            self.store.set(KEY, f"rank {self.rank}: {reason}")
            until = time.monotonic() + ANSWER_S
            while self.store.add(HEARD, 0) < self.world - 1 and time.monotonic() < until:
                time.sleep(POLL_S)
        except RuntimeError:  # the store went with the rank that held it
            return

    def stop(self) -> None:
        self.over.set()
        self.thread.join(1.0)

    def _poll(self) -> None:
        try:
            while not self.over.wait(POLL_S):
                if self.polled.check([KEY]):
                    word = self.polled.get(KEY).decode()
                    print(f"this rank ends with another: {word}", file=sys.stderr, flush=True)
                    self.polled.add(HEARD, 1)
                    time.sleep(GRACE_S)
                    self.end(1)
                    return
        except RuntimeError:
            return


_here: Together | None = None


def begin(store: Any, rank: int, world: int) -> None:
    global _here
    if world > 1:
        _here = Together(store, rank, world)


def tell(reason: str) -> None:
    """Does nothing in a job of one rank, or before `begin`."""
    if _here is not None:
        _here.tell(reason)


def stop() -> None:
    if _here is not None:
        _here.stop()
