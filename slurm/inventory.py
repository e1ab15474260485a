"""What a partition of Slurm has: nodes, their GPUs by Gres, memory, cores and the time limit, from `scontrol`.

`scontrol show node` and `show partition` are asked rather than `sinfo`, whose columns are cut to their widths; `sinfo` is asked for
the names of partitions when one is not found. Left out: other jobs' use of the nodes now (the queue takes care of that), and what no
inventory says (launcher/inventory.py).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Any

from ..launcher.errors import ClusterError, did_you_mean
from ..launcher.inventory import Node, may_be

PAIR = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=")
# States in which a node takes no job until somebody acts (slurm.conf(5), scontrol(1)); flags follow a plus sign.
OUT = ("DOWN", "DRAIN", "FAIL", "ERROR", "FUTURE", "INVAL", "MAINT", "UNKNOWN")
TIMEOUT_S = 30


def partition(name: str) -> tuple[list[Node], dict[str, Any]]:
    """Its nodes that can take jobs, and the `slurm:` settings of a cluster file for it. Raises ClusterError when Slurm does not answer
    or has no such partition."""
    found = records(_scontrol("show", "partition", "--oneliner"))
    names = [row.get("PartitionName", "") for row in found]
    if name not in names:
        raise ClusterError(f"Slurm has no partition '{name}'{did_you_mean(name, names)} (`sinfo -s` lists them)")
    limit = found[names.index(name)].get("MaxTime", "UNLIMITED")
    settings = {"partition": name} | ({} if limit == "UNLIMITED" else {"time": limit})
    rows = records(_scontrol("show", "node", "--oneliner"))
    return [node_of(row) for row in rows if name in row.get("Partitions", "").split(",") and takes_jobs(row)], settings


def refuse_other_gpus(partitions: Sequence[str], gpu: str, source: str) -> None:
    """Slurm gives whatever GPUs a partition has unless it is told a type or a constraint, and a plan is for one type. Raises
    ClusterError when nodes of the partitions have, by their Gres, others than `gpu`."""
    for row in records(_scontrol("show", "node", "--oneliner")):
        there = [name for name in partitions if name in row.get("Partitions", "").split(",")]
        other = [kind for kind in gres(row.get("Gres", "")) if kind and not may_be(kind, gpu)]
        if there and other:
            raise ClusterError(
                f"{source}: partition {there[0]} has {other[0]} GPUs too ({row.get('NodeName')}), and the plan is for {gpu}; say which "
                "are meant, by the site's own word under slurm: gpu_type, or by a constraint."
            )


def records(text: str) -> list[dict[str, str]]:
    """One per line of `scontrol --oneliner`: KEY=VALUE after KEY=VALUE, where values may hold spaces (`OS=Linux 6.1 …`)."""
    out = []
    for line in text.splitlines():
        marks = list(PAIR.finditer(line))
        ends = [mark.start() for mark in marks[1:]] + [len(line)]
        if marks:
            out.append({mark[1]: line[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)})
    return out


def takes_jobs(row: dict[str, str]) -> bool:
    words = row.get("State", "UNKNOWN").upper().rstrip("*~#!%$@^-").split("+")
    return not any(word.startswith(OUT) for word in words) and "NOT_RESPONDING" not in words


def node_of(row: dict[str, str]) -> Node:
    """RealMemory and MemSpecLimit are MiB. Of several GPU types on one node the most frequent is taken, because a run uses one."""
    kinds = gres(row.get("Gres", ""))
    kind = max(sorted(kinds, key=str), key=lambda one: kinds[one], default=None)
    return Node(
        gpu=kind,
        gpus=kinds.get(kind, 0),
        cores=max(1, int(row.get("CPUTot", "1"))),
        host_memory_gib=max(1, int(row.get("RealMemory", "1"))) / 1024,
        host_reserved_gib=int(row.get("MemSpecLimit", "0")) / 1024,
    )


def gres(text: str) -> dict[str | None, int]:
    """GPUs by type: `gpu:a100:4(S:0-1),gpu:2,shard:8` is {"a100": 4, None: 2}. Counts may end in K."""
    found: dict[str | None, int] = {}
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        words = part.strip().split(":")
        if words[0] != "gpu":
            continue
        count, kind = "1", None
        for word in words[1:]:
            if re.fullmatch(r"\d+[kK]?", word):
                count = word
            elif word:
                kind = word
        number = int(count.rstrip("kK")) * (1024 if count[-1] in "kK" else 1)
        if number:
            found[kind] = found.get(kind, 0) + number
    return found


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise ClusterError("there is no `scontrol` on this machine; ask from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"Slurm did not answer `scontrol {' '.join(arguments)}` within {TIMEOUT_S} s") from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(f"`scontrol {' '.join(arguments)}` failed: {reason[0] if reason else done.returncode}")
    return done.stdout
