"""A failing rank's word reaches the others through a real store, while one of them is stuck."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from trebuchet.launcher.together import Together


def test_the_word_of_one_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    ended = [threading.Event() for _ in range(3)]
    codes: list[int] = []
    ranks = [
        Together(
            store if rank == 0 else store.clone(), rank, 3, lambda code, r=rank: (codes.append(code), ended[r].set())
        )
        for rank in range(3)
    ]
    ranks[1].tell("out of memory")
    assert ended[0].wait(20) and ended[2].wait(20)
    assert not ended[1].is_set() and codes == [1, 1]
    assert capsys.readouterr().err.count("this rank ends with another: rank 1: out of memory") == 2


def test_quiet_until_stopped_and_alone_without_a_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    ended = threading.Event()
    one = Together(store, 0, 2, lambda code: ended.set())
    assert not ended.wait(0.3)
    one.stop()
    assert not one.thread.is_alive()
    began = time.monotonic()
    one.tell("nobody hears")
    assert time.monotonic() - began >= 2.0 and store.get("trebuchet/ended") == b"rank 0: nobody hears"
