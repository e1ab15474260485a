"""`trebuchet cluster up | resize | down | status NAME`: clusters that Trebuchet starts, and what is known of any.

The head's process is head.py; whether it is a process of this machine or a Slurm job is said by `ray.provider` of the cluster
file. Left out: handing in runs (scheduler.py).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import yaml

from ..launcher.cluster import Cluster
from ..launcher.errors import ClusterError
from ..launcher.record import write_atomically
from . import rest
from .settings import RaySettings, ray_settings
from .state import ClusterFolder, cluster_folder

DETECTED = ("A10", "A100", "B200", "H100", "H200", "L4", "L40S", "T4", "V100")
START_S = 120.0
STOP_S = 60.0
LOCAL_NODES = f"{__package__}.node_provider.LocalNodes"
Say = Callable[[str], None]


def up(cluster: Cluster, say: Say = print) -> dict[str, Any]:
    """Starts the cluster and returns its facts when jobs can be handed in. One that is up already is an error."""
    settings = of_ray(cluster)
    if settings.provider == "existing":
        raise ClusterError(f"{cluster.name} is kept by others (ray.provider: existing); there is nothing to start.")
    if any(letter.isspace() for letter in sys.executable):  # Ray 2.60 puts paths into shell lines as they are
        raise ClusterError(
            f"Ray does not start from a folder with a space in its name, and this Python is {sys.executable}. Install into "
            "a virtual environment whose path has none."
        )
    folder = cluster_folder(cluster.name)
    if folder.exists:
        if alive(folder):
            raise ClusterError(f"the Ray cluster {cluster.name} is up already, at {folder.read()['address']}.")
        say(f"what was left of an earlier {cluster.name} is removed")
        down(cluster.name, say)
    folder.create(
        provider=settings.provider,
        host="127.0.0.1" if settings.provider == "local" else None,
        object_store_bytes=int(settings.object_store_gib * 2**30),
        group=cluster.groups[0].model_dump(mode="json"),
        ready=False,
    )
    write_autoscaling(folder, cluster, settings, settings.min_nodes, most_nodes(cluster, settings))
    if settings.provider == "slurm":
        from ..slurm import ray_jobs

        ray_jobs.start_head(folder, cluster)
    else:
        start_head(folder)
    return wait_until_ready(folder)


def start_head(folder: ClusterFolder) -> None:
    from .processes import write_process

    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.head", str(folder.root)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    write_process(folder.root / "supervisor.json", process.pid)


def wait_until_ready(folder: ClusterFolder) -> dict[str, Any]:
    deadline, how = time.monotonic() + START_S, f"did not come up within {START_S:.0f} s"
    while time.monotonic() < deadline:
        facts = folder.read()
        if facts["ready"]:
            return facts
        if not alive(folder):
            how = "ended before it was up"
            break
        time.sleep(0.2)
    tail = " / ".join(folder.log.read_text(errors="replace").strip().splitlines()[-3:]) if folder.log.exists() else ""
    down(folder.name, lambda line: None, keep_log=True)
    raise ClusterError(f"the head of {folder.name} {how}. Its last words: {tail}")


def resize(name: str, nodes: int, *, at_most: bool = False) -> None:
    """Exactly `nodes` nodes from now on; with `at_most` none to so many, as work asks for them. The autoscaler reads its
    file before each decision, so this returns at once. (A run that asks for more than `at_most` allows gets none of it: version 2
    of the autoscaler starts nothing for a request that it cannot meet whole.)"""
    folder = cluster_folder(name)
    folder.read()
    config = yaml.safe_load(folder.autoscaling.read_text(encoding="utf-8"))
    worker = config["available_node_types"]["worker"]
    config["max_workers"] = worker["max_workers"] = nodes
    worker["min_workers"] = 0 if at_most else nodes
    write_atomically(folder.autoscaling, yaml.safe_dump(config, sort_keys=False))


def down(name: str, say: Say = print, *, keep_log: bool = False) -> None:
    """Ends the head and every node, and returns when nothing of the cluster is left: no process, no job in a queue."""
    from .processes import end_process

    folder = cluster_folder(name)
    facts = folder.read()
    if facts["provider"] == "slurm":
        from ..slurm import ray_jobs

        ray_jobs.stop(folder)
    else:
        for file in ("supervisor.json", "head.json"):  # the first ends the head and the nodes; then what it could not
            with contextlib.suppress(FileNotFoundError):
                end_process(json.loads((folder.root / file).read_text(encoding="utf-8")), term_s=STOP_S)
        from .head import end_nodes

        end_nodes(folder)
    folder.remove(keep_log=keep_log)
    say(f"{name} is down")


def status(cluster: Cluster) -> dict[str, Any]:
    """Nodes and what they have, as Ray knows them; `up` is False when the head does not answer."""
    settings, name = of_ray(cluster), cluster.name
    if settings.provider == "existing":
        return status_of_others(cluster, settings)
    folder = cluster_folder(name)
    facts = folder.read()
    shown = {"name": name, "provider": facts["provider"], "address": facts["address"], "dashboard": facts["dashboard"]}
    limits = yaml.safe_load(folder.autoscaling.read_text(encoding="utf-8"))["available_node_types"]["worker"]
    shown |= {"least": limits["min_workers"], "most": limits["max_workers"]}
    try:
        return shown | {"up": True, "nodes": nodes(folder)}
    except ClusterError:
        return shown | {"up": alive(folder), "nodes": []}


def status_of_others(cluster: Cluster, settings: RaySettings) -> dict[str, Any]:
    """Of a cluster that others keep, who alone know its limits."""
    token = settings.token_file.expanduser() if settings.token_file else None
    shown = {"name": cluster.name, "provider": "existing", "address": settings.address, "dashboard": settings.dashboard}
    shown |= {"least": None, "most": None}
    try:
        return shown | {"up": True, "nodes": workers(rest.Dashboard(cluster.name, str(settings.dashboard), token))}
    except ClusterError:
        return shown | {"up": False, "nodes": []}


def nodes(folder: ClusterFolder) -> list[dict[str, Any]]:
    """The same of a cluster of ours."""
    return workers(rest.of_cluster(folder))


def workers(dashboard: rest.Dashboard) -> list[dict[str, Any]]:
    """The living worker nodes: id, name, address, resources. Raises ClusterError when the head does not answer."""
    found = dashboard.nodes()
    return [
        {"node_id": n["node_id"], "name": n["node_name"], "ip": n["node_ip"], "resources": n["resources_total"]}
        for n in found
        if n["state"] == "ALIVE" and not n["is_head_node"]
    ]


def alive(folder: ClusterFolder) -> bool:
    """Whether what keeps the head lives: its process, or its job."""
    facts = folder.read()
    if facts["provider"] == "slurm":
        from ..slurm import ray_jobs

        return ray_jobs.head_alive(folder)
    from .processes import process_of

    try:
        return process_of(json.loads((folder.root / "supervisor.json").read_text(encoding="utf-8"))) is not None
    except FileNotFoundError:
        return False


def write_autoscaling(folder: ClusterFolder, cluster: Cluster, settings: RaySettings, least: int, most: int) -> None:
    from .head import autoscaling

    module = LOCAL_NODES
    if settings.provider == "slurm":
        module = f"{__package__.rpartition('.')[0]}.slurm.ray_nodes.SlurmNodes"
    tree = autoscaling(
        folder, module=module, resources=resources(cluster), least=least, most=most, idle_s=settings.idle_s
    )
    write_atomically(folder.autoscaling, yaml.safe_dump(tree, sort_keys=False))


def resources(cluster: Cluster) -> dict[str, float]:
    """Of one node: its cores and GPUs, and the GPUs' type as Ray spells it."""
    group = cluster.groups[0]
    found: dict[str, float] = {"CPU": group.cores}
    if group.gpu is not None:
        found["GPU"] = group.gpus_per_node
        if kind := accelerator(group.gpu):
            found[f"accelerator_type:{kind}"] = 1
    return found


def accelerator(gpu: str) -> str | None:
    """Ray's name of a type, where Ray finds it by itself: the first word after NVIDIA, so A100 and H100 and nothing of use for
    a GeForce (ray/_private/accelerators/nvidia_gpu.py). None where ranks cannot be held to the type."""
    name = gpu.partition("-")[0]
    return name if name in DETECTED else None


def most_nodes(cluster: Cluster, settings: RaySettings) -> int:
    return settings.max_nodes or cluster.groups[0].nodes


def of_ray(cluster: Cluster) -> RaySettings:
    if cluster.scheduler != "ray":
        raise ClusterError(f"{cluster.name} is a cluster of the scheduler {cluster.scheduler}, not of ray.")
    if len(cluster.groups) > 1:
        raise ClusterError(f"{cluster.name} has several kinds of nodes; a Ray cluster of Trebuchet's has one.")
    return ray_settings(cluster.ray, cluster.name)
