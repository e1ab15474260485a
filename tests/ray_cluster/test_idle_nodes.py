"""Which of several equal nodes Ray's autoscaler keeps for a standing request: those at work, so that an idle one ends."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from trebuchet.ray_cluster.state import WORKER_TYPE

pytest.importorskip("ray.autoscaler.v2.scheduler", reason="needs ray")

from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance, NodeState
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from trebuchet.ray_cluster.node_provider import Nodes


def request(idle_s: list[float | None], wanted: int) -> SchedulingRequest:
    """Nodes of four cores, in this order, each idle for so long, or with a rank in its placement group (0), or still to come (None);
    `wanted` bundles of all cores are asked for, and idle nodes end after 5 s."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig

    kind = NodeTypeConfig(name=WORKER_TYPE, min_worker_nodes=0, max_worker_nodes=9, resources={"CPU": 4})
    rows = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 4}) for _ in range(wanted)])
    return SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={WORKER_TYPE: kind},
        max_num_nodes=9,
        idle_timeout_s=5,
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=rows)] if wanted else [],
        current_instances=[node(f"n{index}", idle) for index, idle in enumerate(idle_s)],
    )


def node(name: str, idle_s: float | None) -> AutoscalerInstance:
    if idle_s is None:
        to_come = Instance(
            instance_id=name, instance_type=WORKER_TYPE, status=Instance.REQUESTED, node_kind=NodeKind.WORKER
        )
        return AutoscalerInstance(im_instance=to_come)
    total = {"CPU": 4.0, "memory": 1e9}
    group = {} if idle_s else {"CPU_group_0_beef": 4.0, "CPU_group_beef": 4.0, "bundle_group_beef": 1000.0}
    ray_node = NodeState(
        node_id=name.encode(),
        instance_id=name,
        ray_node_type_name=WORKER_TYPE,
        available_resources=total if idle_s else {"memory": 1e9, "bundle_group_beef": 1000.0},
        total_resources=total | group,
        idle_duration_ms=int(idle_s * 1000),
    )
    instance = Instance(
        instance_id=name,
        instance_type=WORKER_TYPE,
        status=Instance.RAY_RUNNING,
        node_kind=NodeKind.WORKER,
        node_id=name,
        cloud_instance_id=name,
    )
    return AutoscalerInstance(cloud_instance_id=name, ray_node=ray_node, im_instance=instance)


@pytest.fixture
def provider(tmp_path: Path) -> Nodes:
    """What Ray's monitor loads; from then on the scheduler of that process keeps the nodes at work."""
    return Nodes({"state_folder": str(tmp_path)}, "test")


@pytest.mark.parametrize("order", sorted(set(itertools.permutations([0, 0, 60]))))
def test_the_idle_one_ends_wherever_it_stands(provider: Nodes, order: tuple[float, ...]) -> None:
    """A run asks for two nodes and has ranks on two; a third, that came while the second left, ends."""
    reply = ResourceDemandScheduler().schedule(asked := request(list(order), wanted=2))
    assert [end.instance_id for end in reply.to_terminate] == [f"n{order.index(60)}"]
    assert not reply.to_launch
    assert [one.im_instance.instance_id for one in asked.current_instances] == ["n0", "n1", "n2"]


def test_one_that_is_asked_for_stays(provider: Nodes) -> None:
    reply = ResourceDemandScheduler().schedule(request([60, 0, 60], wanted=2))
    assert len(reply.to_terminate) == 1 and not reply.to_launch
    reply = ResourceDemandScheduler().schedule(request([60, 0, 60], wanted=3))
    assert not reply.to_terminate and not reply.to_launch
    reply = ResourceDemandScheduler().schedule(request([60, 0], wanted=3))
    assert not reply.to_terminate and len(reply.to_launch) == 1


def test_of_the_idle_ones_the_one_that_was_last_at_work_stays(provider: Nodes) -> None:
    reply = ResourceDemandScheduler().schedule(request([60, 30, 0], wanted=2))
    assert [end.instance_id for end in reply.to_terminate] == ["n0"]


def test_an_idle_one_is_rather_kept_than_one_that_is_still_to_come(provider: Nodes) -> None:
    """Both are there for one that is needed beside the one at work; a node that comes and is not needed ends when it has been idle."""
    reply = ResourceDemandScheduler().schedule(request([None, 60, 0], wanted=2))
    assert not reply.to_terminate and not reply.to_launch
