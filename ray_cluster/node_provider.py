"""Nodes for Ray's autoscaler (version 2, which drains a node before it ends it), as one small interface over its provider class.

A provider says which nodes there are, starts one and stops one; everything that the autoscaler remembers of a node travels in its
tags, so that a monitor that starts again finds the same nodes. Here: nodes that are processes of this machine. In
slurm/ray_nodes.py: nodes that are Slurm jobs. Source: ray.autoscaler.node_provider.NodeProvider and the adapter of version 2
(ray/autoscaler/v2/instance_manager/node_provider.py), which calls these methods and no others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider

from .processes import end_process, process_of, write_process
from .state import HEAD_ID, HEAD_LOST_S, HEAD_TYPE, WORKER_TYPE, ClusterFolder, authentication, ray_program

logger = logging.getLogger(__name__)
HEAD_TAGS = {"ray-node-type": "head", "ray-user-node-type": HEAD_TYPE, "ray-node-status": "up-to-date"}


@dataclass(frozen=True)
class Node:
    id: str
    tags: dict[str, str]
    running: bool


class Nodes(NodeProvider):
    """What both kinds have in common. `listed` is one question for all nodes and is asked once per round of the autoscaler."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self.folder = ClusterFolder(Path(provider_config["state_folder"]))
        self.found: dict[str, Node] = {}
        keep_nodes_at_work()

    def listed(self) -> dict[str, Node]:
        raise AssertionError("each kind of node lists its own")

    def start(self, node_id: str, tags: dict[str, str], resources: dict[str, float]) -> None:
        raise AssertionError("each kind of node starts its own")

    def stop(self, node_id: str) -> None:
        raise AssertionError("each kind of node stops its own")

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self.found = {HEAD_ID: Node(HEAD_ID, HEAD_TAGS, True), **self.listed()}
        return [n.id for n in self.found.values() if tag_filters.items() <= n.tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self.found and self.found[node_id].running

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self.found

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self.found[node_id].tags if node_id in self.found else {}

    def internal_ip(self, node_id: str) -> str:
        return node_id

    external_ip = internal_ip

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: Any
    ) -> None:
        for _ in range(count):
            self.start(f"{WORKER_TYPE}-{uuid.uuid4().hex[:8]}", {**tags, "ray-node-status": "up-to-date"}, resources)

    def terminate_nodes(self, node_ids: list[str]) -> None:
        for node_id in node_ids:
            if node_id != HEAD_ID:
                self.stop(node_id)

    def terminate_node(self, node_id: str) -> None:
        self.terminate_nodes([node_id])


def keep_nodes_at_work() -> None:
    """In the autoscaler's process: what is asked for stands on the nodes at work, so that an idle one beside them ends.

    Ray Train asks for the nodes of its ranks as long as a run lasts, and what is asked for is never ended. Of several nodes Ray's
    scheduler (2.60) takes those with the best average use, over all resources of a node; a placement group adds resources to the nodes
    that it is on, so an idle node always wins over one with ranks, and stays until the last run is over. Seen after a drain, when two
    nodes had been started in place of one; a second run that ends leaves its nodes so, too.
    """
    from ray.autoscaler.v2.scheduler import ResourceRequestSource, SchedulingNode

    plain: Any = getattr(SchedulingNode, "_compute_score", None)
    if plain is None:
        logger.warning(
            "Ray's scheduler is not the one that is known here: idle nodes may be held until the last run is over"
        )
    if plain is None or getattr(plain, "keeps_nodes_at_work", False):
        return

    def score(self: SchedulingNode, source: ResourceRequestSource) -> Any:
        """Labels, GPU, kinds of resources, and only then: at work, idle, still to come; then use, as before."""
        found: tuple[Any, ...] = plain(self, source)
        if source != ResourceRequestSource.CLUSTER_RESOURCE_CONSTRAINT:
            return found
        rank = -float(self.idle_duration_ms) if self.ray_node_id else -math.inf
        return (*found[:3], rank, *found[3:])

    score.keeps_nodes_at_work = True  # type: ignore[attr-defined]
    SchedulingNode._compute_score = score  # type: ignore[method-assign,assignment]


class LocalNodes(Nodes):
    """Nodes that are `ray start --block` processes of this machine. Their files hold process ids with start times, so that a
    number that was given to another process in the meantime is not taken for the node."""

    def listed(self) -> dict[str, Node]:
        found = {}
        for file in sorted(self.folder.nodes.glob("*.json")):
            facts = json.loads(file.read_text(encoding="utf-8"))
            if process_of(facts) is None:
                file.unlink(missing_ok=True)
                continue
            found[file.stem] = Node(file.stem, facts["tags"], True)
        return found

    def start(self, node_id: str, tags: dict[str, str], resources: dict[str, float]) -> None:
        facts = self.folder.read()
        scratch = Path(facts["scratch"]) / node_id.rpartition("-")[2]  # short: it holds sockets
        command = node_command(facts["address"], node_id, resources, scratch, facts["object_store_bytes"])
        with (self.folder.nodes / f"{node_id}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=node_environment(self.folder, node_id),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        write_process(self.folder.nodes / f"{node_id}.json", process.pid, tags=tags)

    def stop(self, node_id: str) -> None:
        file = self.folder.nodes / f"{node_id}.json"
        with contextlib.suppress(FileNotFoundError):
            end_process(json.loads(file.read_text(encoding="utf-8")))
            file.unlink(missing_ok=True)


def node_command(
    address: str, node_id: str, resources: dict[str, float], scratch: Path, object_store: int
) -> list[str]:
    """`ray start` of a worker node. Its own temp-dir: two raylets of one host that share one can take the same socket."""
    extra = {k: v for k, v in resources.items() if k not in ("CPU", "GPU", "memory", "object_store_memory")}
    return [
        *ray_program(), "start", f"--address={address}", "--block", f"--node-name={node_id}", f"--temp-dir={scratch}",
        f"--num-cpus={int(resources.get('CPU', 1))}", f"--num-gpus={int(resources.get('GPU', 0))}",
        f"--object-store-memory={object_store}", f"--resources={json.dumps(extra)}", "--disable-usage-stats",
        "--dashboard-agent-listen-port=0", "--include-log-monitor=false",
    ]  # fmt: skip


def node_environment(folder: ClusterFolder, node_id: str) -> dict[str, str]:
    return {
        **os.environ,
        **authentication(folder.token),
        "RAY_CLOUD_INSTANCE_ID": node_id,  # how version 2 of the autoscaler knows which of its nodes this is
        "RAY_NODE_TYPE_NAME": WORKER_TYPE,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_LOST_S),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the autoscaler has drained it
    }
