"""Who came: before anything needs all ranks, the first of them counts the others, and names the node of one that does not come.

A process group that misses a rank says nothing until its own time-out, and then not whom it missed. A rank is missing when its node's
daemon hangs, when its program does not start (a file system that does not answer), or when it cannot reach the first node. Left out:
what the ranks find once they are all there (allocation.py), and a job whose first node itself does not come, beyond saying so.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

LIMIT_S = (
    40.0  # from the first rank's coming; with its own start, and with ANSWER_S, the verdict is there within a minute
)
ANSWER_S = 10.0  # what the others wait for the first one, or for its verdict, beyond that
HEARD_S = 2.0  # what the first rank, which holds the store, waits for the others to have read a bad verdict
_store: dist.TCPStore | None = None  # kept: the process group's own store is served at the same port by the same server


def call(environment: Mapping[str, str] = os.environ) -> tuple[list[str], dict[int, str]]:
    """Collective, before the process group exists. One sentence for each node with ranks missing, and the node of each rank that came.

    `environment` is that of a worker; `TREBUCHET_NODES` has the job's nodes, separated by commas, and `TREBUCHET_ROLL_CALL_S`
    another limit in seconds than LIMIT_S.
    """
    global _store
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    here = environment.get("SLURMD_NODENAME", "")
    if world == 1:
        return [], {0: here}
    limit_s = float(environment.get("TREBUCHET_ROLL_CALL_S", LIMIT_S))
    nodes = [name for name in environment.get("TREBUCHET_NODES", "").split(",") if name]
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    longest = timedelta(seconds=limit_s + ANSWER_S)
    try:
        store = dist.TCPStore(address, port, world, rank == 0, longest, wait_for_workers=False, multi_tenant=True)
        _store = store
        store.set(f"came/{rank}", here)
        if rank == 0:
            store.set("verdict", json.dumps(_count(store, world, limit_s)))
        came = {int(number): node for number, node in json.loads(store.get("verdict")).items()}
        if len(came) < world:
            _until_heard(store, rank, len(came))
    except RuntimeError:  # torch's DistError: no connection, or none any more
        first = nodes[0] if nodes else address
        return [f"{first}: its rank 0, where all ranks meet ({address}:{port}), did not answer rank {rank}"], {
            rank: here
        }
    return missing(came, world, nodes, limit_s), came


def _count(store: dist.TCPStore, world: int, limit_s: float) -> dict[int, str]:
    """The node of each rank that comes within the limit."""
    came: dict[int, str] = {}
    until = time.monotonic() + limit_s
    while len(came) < world and time.monotonic() < until:
        for rank in range(world):
            if rank not in came and store.check([f"came/{rank}"]):
                came[rank] = store.get(f"came/{rank}").decode()
        time.sleep(0.02)
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
