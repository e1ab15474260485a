"""Who came: before anything needs all ranks, the first of them counts the others, and names the node of one that does not come.

A process group that misses a rank says nothing until its own time-out, and then not whom it missed. A rank is missing when its node's
daemon hangs, when its program does not start (a file system that does not answer), or when it cannot reach the first node. One that has
begun and is still loading (launcher/started.py) is waited for longer. Left out: what the ranks find once they are all there
(allocation.py).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..launcher import started

LIMIT_S = (
    40.0  # from the first rank's coming; with its own start, and with ANSWER_S, the verdict is there within a minute
)
SLOW_S = 600.0  # the same for ranks that have begun
ANSWER_S = 10.0  # what the others wait for the first one, or for its verdict, beyond that
HEARD_S = 2.0  # what the first rank, which holds the store, waits for the others to have read a bad verdict
# Rank 0's, kept: others may still ask, and the process group's own store is served by it too.
_served: dist.TCPStore | None = None


def call(folder: Path, environment: Mapping[str, str] = os.environ) -> tuple[list[str], dict[int, str]]:
    """Collective, before the process group exists. One sentence for each node with ranks missing, and the node of each rank that came.

    `folder` has the ranks' marks. `environment` is that of a worker; `TREBUCHET_NODES` has the job's nodes, separated by commas, and
    `TREBUCHET_ROLL_CALL_S` another limit in seconds than LIMIT_S.
    """
    global _served
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    here = environment.get("SLURMD_NODENAME", "")
    if world == 1:
        started.clear(folder, rank)
        return [], {0: here}
    limit_s = float(environment.get("TREBUCHET_ROLL_CALL_S", LIMIT_S))
    nodes = [name for name in environment.get("TREBUCHET_NODES", "").split(",") if name]
    try:
        store = _connect(folder, environment, limit_s)
        if rank == 0:
            _served = store
        store.set(f"came/{rank}", here)
        if rank == 0:
            store.set("verdict", json.dumps(_count(store, world, limit_s, folder, environment)))
        came = {int(number): node for number, node in json.loads(store.get("verdict")).items()}
        if len(came) < world:
            _until_heard(store, rank, len(came))
    except RuntimeError:  # torch's DistError: no connection, or none any more
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        first = nodes[0] if nodes else environment["MASTER_ADDR"]
        return [f"{first}: its rank 0, where all ranks meet ({where}), did not answer rank {rank}"], {rank: here}
    finally:
        started.clear(folder, rank)
    return missing(came, world, nodes, limit_s), came


def _connect(folder: Path, environment: Mapping[str, str], limit_s: float) -> dist.TCPStore:
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])

    def within(seconds: float) -> dist.TCPStore:
        span = timedelta(seconds=seconds)
        return dist.TCPStore(address, port, world, rank == 0, span, wait_for_workers=False, multi_tenant=True)

    try:
        store = within(limit_s + ANSWER_S)
    except RuntimeError:
        if not started.has_begun(folder, 0, environment):
            raise
        store = within(SLOW_S)
    store.set_timeout(timedelta(seconds=limit_s + SLOW_S + ANSWER_S))
    return store


def _count(
    store: dist.TCPStore, world: int, limit_s: float, folder: Path, environment: Mapping[str, str]
) -> dict[int, str]:
    """The node of each rank that comes within the limit, or, as long as all that are missing have begun, within the longer one."""
    came: dict[int, str] = {}
    began = time.monotonic()
    while len(came) < world:
        for rank in range(world):
            if rank not in came and store.check([f"came/{rank}"]):
                came[rank] = store.get(f"came/{rank}").decode()
        waited = time.monotonic() - began
        absent = [rank for rank in range(world) if rank not in came]
        if waited > limit_s and not all(started.has_begun(folder, rank, environment) for rank in absent):
            break
        if waited > limit_s + SLOW_S:
            break
        time.sleep(0.02 if waited < limit_s else 1.0)
    return came


def _until_heard(store: dist.TCPStore, rank: int, came: int) -> None:
    heard, until = store.add("heard", 1), time.monotonic() + HEARD_S
    while rank == 0 and heard < came and time.monotonic() < until:
        time.sleep(0.02)
        heard = store.add("heard", 0)


def missing(came: Mapping[int, str], world: int, nodes: Sequence[str], limit_s: float) -> list[str]:
    """One sentence for each node of which ranks are missing; which ranks are on which node is taken from those that came, because
    sites may deal them out in another order."""
    absent = [rank for rank in range(world) if rank not in came]
    if not absent:
        return []
    within = f"did not come within {limit_s:g} s; is the node alive, and does it see the shared file system?"
    per_node, there = world // max(1, len(nodes)), Counter(came.values())
    short = [node for node in nodes if there[node] < per_node]
    if len(short) == 1:
        many = f"ranks {', '.join(map(str, absent))}" if len(absent) > 1 else f"rank {absent[0]}"
        return [f"{short[0]}: its {many} {within}"]
    if not short:
        return [f"ranks {', '.join(map(str, absent))} {within}"]
    return [f"{node}: {per_node - there[node]} of its {per_node} ranks {within}" for node in short]
