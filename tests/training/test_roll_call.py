"""Ranks that come and one that does not, over a real store; what is then said of which node."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore
from trebuchet.launcher import started
from trebuchet.training import roll_call

NODES = ("n1", "n2", "n3")
Answer = tuple[list[str], dict[int, str]]


def environment(rank: int, port: int, limit_s: float) -> dict[str, str]:
    """Of one of three ranks, one on each node."""
    return {
        "RANK": str(rank), "WORLD_SIZE": "3", "SLURMD_NODENAME": NODES[rank], "TREBUCHET_NODES": ",".join(NODES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TREBUCHET_ROLL_CALL_S": str(limit_s),
    }  # fmt: skip


def ranks_come(folder: Path, ranks: list[int], limit_s: float, late: Callable[[], None] = lambda: None) -> list[Answer]:
    """Each in a thread of its own, which is where its client of the store waits; the last one after `late`."""

    def come(rank: int) -> Answer:
        if rank == ranks[-1]:
            late()
        return roll_call.call(folder, environment(rank, port, limit_s))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come, ranks))


def test_all_came(tmp_path: Path) -> None:
    assert ranks_come(tmp_path, [0, 1, 2], 60) == [([], dict(enumerate(NODES)))] * 3
    served = roll_call._served  # by rank 0, whose call is over: a slower one may still ask
    assert served is not None
    late = TCPStore("127.0.0.1", served.port, is_master=False, timeout=timedelta(seconds=5))
    assert json.loads(late.get("verdict")) == {"0": "n1", "1": "n2", "2": "n3"}


@pytest.mark.slow
def test_every_rank_that_came_names_the_node_of_the_one_that_did_not(tmp_path: Path) -> None:
    for problems, came in ranks_come(tmp_path, [0, 2], 3):
        assert came == {0: "n1", 2: "n3"}
        assert len(problems) == 1 and problems[0].startswith("n2: its rank 1 did not come within 3 s"), problems


@pytest.mark.slow
def test_a_rank_that_has_begun_is_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mark is of this attempt; one of another attempt is none."""
    monkeypatch.setattr(roll_call, "ANSWER_S", 0.5)

    def late() -> None:
        time.sleep(1.5)  # longer than the limit: nothing is to be awaited but time

    of_before = {"RANK": "1", "SLURM_RESTART_COUNT": "1"}
    for mark, named in ({"RANK": "1"}, []), (of_before, ["n2"]):
        started.mark(tmp_path, mark)
        problems, _ = ranks_come(tmp_path, [0, 2, 1], 0.5, late)[0]
        assert [problem.partition(":")[0] for problem in problems] == named
    assert not list(tmp_path.iterdir())  # marks do not stay


@pytest.mark.slow
def test_a_first_rank_that_does_not_come_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "ANSWER_S", 0.5)
    for (problems, came), rank in zip(ranks_come(tmp_path, [1, 2], 0.5), (1, 2), strict=True):
        assert came == {rank: NODES[rank]}
        assert len(problems) == 1 and problems[0].startswith("n1: its rank 0") and f"rank {rank}" in problems[0]


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_exactly_the_nodes_with_missing_ranks_are_named(count: int, per_node: int, data: st.DataObject) -> None:
    """In whatever order ranks are dealt out to nodes."""
    nodes = [f"node-{i}" for i in range(count)]
    dealt = data.draw(st.permutations([node for node in nodes for _ in range(per_node)]))
    absent = data.draw(st.sets(st.integers(0, len(dealt) - 1)))
    came = {rank: node for rank, node in enumerate(dealt) if rank not in absent}
    found = roll_call.missing(came, len(dealt), nodes, 40)
    assert {text.partition(":")[0] for text in found} == {dealt[rank] for rank in absent}
    assert len(found) == len({dealt[rank] for rank in absent})
