"""Ray Train's watch for nodes that are taken back, on the head.

Ray Train (2.60) starts it as an actor that needs nothing, which Ray may put on any node: on an idle one, which then never ends, because
somebody is on it; or on the very node that is taken back. Here it is where the run's controller is, which is the head. The driver
switches Ray Train's own off (`OFF`), and hands this one in as a callback.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OFF = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


class WatchFromTheHead(PreemptionCallback):
    """Runs in the controller, once for each group of ranks."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()  # of a group before, whose end may have passed it over
        nodes: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            nodes.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        watcher: Any = ray.remote(num_cpus=0, max_restarts=-1)(PreemptionWatcher)
        self._watcher = watcher.options(scheduling_strategy=here).remote(
            node_to_ranks=nodes, poll_interval_s=self._poll_interval_s, worker_actors_by_rank=actors
        )
