"""Ray inside Slurm: a node provider for Ray's autoscaler whose nodes are Slurm jobs.

The autoscaler's demand becomes sbatch calls, a drained node's job is cancelled, a lost one is replaced. Which nodes there are is
read from Slurm by one squeue, the autoscaler's tags from the jobs' comments, so that nothing has to be remembered. Left out: the
jobs themselves (ray_jobs.py). Importing this needs ray.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

from ..launcher.cluster import NodeGroup
from ..launcher.job import JobState
from ..ray_cluster.node_provider import Node, Nodes
from . import ray_jobs, states


class SlurmNodes(Nodes):
    def listed(self) -> dict[str, Node]:
        found = {}
        for state, comment in ray_jobs.jobs(self.folder).values():
            node_id, _, tags = comment.partition("&")
            if node_id != "head" and not state.ended:
                found[node_id] = Node(node_id, dict(parse_qsl(tags)), state == JobState.RUNNING)
        return found

    def start(self, node_id: str, tags: dict[str, str], resources: dict[str, float]) -> None:
        facts = self.folder.read()
        group, site = NodeGroup.model_validate(facts["group"]), ray_jobs.site_of(facts["slurm"], self.folder.name)
        script = ray_jobs.render_node(self.folder, group, site, facts["python"], node_id, resources)
        ray_jobs.submit(script, self.folder, f"{node_id}&{urlencode(tags)}")

    def stop(self, node_id: str) -> None:
        for job, (_, comment) in ray_jobs.jobs(self.folder).items():
            if comment.partition("&")[0] == node_id:
                states.call("scancel", job)
