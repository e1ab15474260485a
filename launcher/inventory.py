"""Clusters asked for what they have: `--cluster slurm:PARTITION[:GPU]` and `--cluster ray:ADDRESS[:GPU]` beside files and names.

What the schedulers do not know is taken from the type of the GPU (launcher/gpus.json) or left out: link bandwidths between nodes and
prices are in no inventory. `GPU` names the type where the scheduler does not, and chooses among several kinds of nodes. Left out: the
commands themselves, which are in slurm/inventory.py, and this machine (machine.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cluster import Cluster, build_cluster, gpu_types
from .errors import ClusterError, did_you_mean

GIB = 2**30
RAY_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node as its scheduler describes it. `gpu` is the scheduler's word for the type, None where it has none."""

    gpu: str | None
    gpus: int
    cores: int
    host_memory_gib: float
    host_reserved_gib: float = 0.0


def gpu_named(word: str) -> str | None:
    """Our name of a GPU type by a scheduler's (`a100`, `nvidia_h100_80gb_hbm3`, `A100-80G`). Of several that it may mean the one with
    the least memory, so that a plan made for it fits the others as well."""
    types = gpu_types()
    wanted = _words(word)
    exact = [name for name in types if "".join(_words(name)) == "".join(wanted)]
    if exact or not wanted:
        return exact[0] if exact else None
    inside = [name for name in types if set(_words(name)) <= set(wanted)]  # more is said than the type's name
    if inside:
        return max(inside, key=lambda name: (len(_words(name)), name))
    around = [name for name in types if set(wanted) <= set(_words(name))]
    return min(around, key=lambda name: (types[name]["gpu_memory_gib"], name), default=None)


def may_be(word: str, name: str) -> bool:
    """Whether a scheduler's word can stand for our type `name`: `a100` for both A100-40GB and A100-80GB."""
    return gpu_named(word) == name or (bool(_words(word)) and set(_words(word)) <= set(_words(name)))


def _words(name: str) -> list[str]:
    """`nvidia_a100_80gb_pcie` and `A100-80G-PCIe` are both a100, 80gb, pcie."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("", "nvidia", "geforce", "tesla")]
    return [re.sub(r"^(\d+)g$", r"\1gb", word) for word in words]


def cluster_of(
    nodes: Sequence[Node], *, name: str, scheduler: str, gpu: str | None, settings: Mapping[str, Any]
) -> Cluster:
    """Nodes with as many GPUs of one type as one group each, those with most GPUs first; nodes of a group that differ in cores or
    memory count as their least. Where GPUs of one type are taken out of several, Slurm is told its own word for them. Raises
    ClusterError when there is no node, when a type is unknown, and when no node has GPUs of the type that was asked for."""
    told: dict[str, Any] = dict(settings)
    if gpu is not None:
        wanted = gpu_named(gpu)
        if wanted is None:
            raise ClusterError(f"{name}: '{gpu}' is not a known GPU type{did_you_mean(gpu, gpu_types())}")
        kept = [n for n in nodes if n.gpus and (n.gpu is None or gpu_named(n.gpu) == wanted)]
        said = {n.gpu for n in kept}
        if scheduler == "slurm" and len(said) == 1 and {n.gpu for n in nodes if n.gpus} != said and None not in said:
            told["gpu_type"] = said.pop()
        nodes = kept
    if not nodes:
        what = f"with {gpu} GPUs " if gpu else ""
        raise ClusterError(f"{name} has no node {what}that can take a job now; `sinfo` and `ray status` show why.")
    alike: dict[tuple[str | None, int], list[Node]] = {}
    for node in nodes:
        alike.setdefault((gpu_named(node.gpu) or node.gpu if node.gpu else None, node.gpus), []).append(node)
    kinds = sorted(alike.values(), key=lambda kind: (-kind[0].gpus * len(kind), repr(kind[0])))
    groups = [_group(kind, name, gpu, scheduler) for kind in kinds]
    tree = {"scheduler": scheduler, "groups": groups, scheduler: told}
    return build_cluster(tree, source=name, default_name=name)


def _group(kind: Sequence[Node], name: str, gpu: str | None, scheduler: str) -> dict[str, Any]:
    """Of nodes with as many GPUs of one type: ranks in step have no more than the smallest node gives them."""
    node, least = kind[0], min(kind, key=lambda one: one.host_memory_gib - one.host_reserved_gib)
    measured = f"measured, as {scheduler} reports it" + (
        ", the least of nodes that differ" if len(set(kind)) > 1 else ""
    )
    group: dict[str, Any] = {
        "nodes": len(kind),
        "cores": min(one.cores for one in kind),
        "host_memory_gib": round(least.host_memory_gib, 2),
        "host_reserved_gib": round(least.host_reserved_gib, 2),
        "sources": {key: measured for key in ("cores", "host_memory_gib", "host_reserved_gib")},
    }
    if node.gpus:
        known = gpu_named(gpu or node.gpu or "") if gpu or node.gpu else None
        if known is None:
            calls = f"calls them '{node.gpu}'" if node.gpu else "does not say of which type"
            raise ClusterError(
                f"{name} has nodes with {node.gpus} GPUs and {scheduler} {calls}; name the type, as in {name}:A100-80GB. "
                f"Known types: {', '.join(gpu_types())}."
            )
        group |= {"gpu": known, "gpus_per_node": node.gpus}
    return group


def ask(name: str) -> Cluster:
    """`slurm:PARTITION[:GPU]` or `ray:ADDRESS[:GPU]`."""
    scheduler, _, rest = name.partition(":")
    if scheduler == "slurm":
        from ..slurm import inventory

        partition, _, gpu = rest.partition(":")
        nodes, settings = inventory.partition(partition)
        return cluster_of(nodes, name=f"slurm:{partition}", scheduler="slurm", gpu=gpu or None, settings=settings)
    host, _, last = rest.rpartition(":")
    address, gpu = (rest, "") if last.isdigit() or not host else (host, last)
    return cluster_of(
        ray_nodes(_ask_ray(address)),
        name=f"ray:{address}",
        scheduler="ray",
        gpu=gpu or None,
        settings={"address": address},
    )


def ray_nodes(rows: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes of `ray.nodes()`. Ray counts as memory what is left beside its object store; the type of a GPU is in the name of
    a resource, `accelerator_type:A100`."""
    found = []
    for row in rows:
        resources = row.get("Resources") or {}
        if not row.get("Alive", row.get("alive")) or not resources.get("CPU"):
            continue
        kinds = sorted(key.partition(":")[2] for key in resources if key.startswith("accelerator_type:"))
        gpus = int(resources.get("GPU", 0))
        memory = (resources.get("memory", 0) + resources.get("object_store_memory", 0)) / GIB
        reserved = resources.get("object_store_memory", 0) / GIB
        found.append(
            Node(
                gpu=kinds[0] if kinds and gpus else None,
                gpus=gpus,
                cores=int(resources["CPU"]) or 1,
                host_memory_gib=round(memory, 2),
                host_reserved_gib=round(reserved, 2),
            )
        )
    return found


def _ask_ray(address: str) -> list[dict[str, Any]]:
    """What `ray.nodes()` answers at an address; without changing a Ray that this process already uses."""
    try:
        import ray
    except ImportError:
        raise ClusterError("ray: is not installed here; pip install 'trebuchet[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, ValueError, authentication: no common base
        reason = str(error).strip().split("\n")[0]
        raise ClusterError(
            f"no Ray cluster answers at {address} ({reason}); `ray status --address {address}` shows more"
        ) from None
    try:
        rows: list[dict[str, Any]] = ray.nodes()
        return rows
    finally:
        ray.shutdown()
