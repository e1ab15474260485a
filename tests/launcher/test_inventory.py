"""Ray's nodes as a cluster: the parser on what `ray.nodes()` returns, and a real local Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.errors import ClusterError
from trebuchet.launcher.inventory import Node, cluster_of, ray_nodes

GIB = 2**30


def row(**changes: Any) -> dict[str, Any]:
    """One entry of `ray.nodes()`, Ray 2.60, shortened to what is read and a little more."""
    resources = {
        "CPU": 16.0,
        "GPU": 4.0,
        "memory": 100.0 * GIB,
        "object_store_memory": 28.0 * GIB,
        "node:10.0.0.1": 1.0,
    }
    resources["accelerator_type:L4"] = 1.0
    return {"NodeID": "a", "Alive": True, "NodeManagerHostname": "n1", "Resources": resources, "alive": True, **changes}


def test_nodes_by_kind() -> None:
    small = row(Resources={"CPU": 4.0, "memory": 8.0 * GIB, "object_store_memory": 2.0 * GIB})
    head = row(Resources={"node:__internal_head__": 1.0, "memory": GIB})  # no CPU: nothing runs there
    nodes = ray_nodes([row(), row(), small, row(Alive=False, alive=False), head])
    assert nodes[0] == Node(gpu="L4", gpus=4, cores=16, host_memory_gib=128.0, host_reserved_gib=28.0)
    cluster = cluster_of(nodes, name="ray:x:1", scheduler="ray", gpu=None, settings={"address": "x:1"})
    first, second = cluster.groups
    assert (first.nodes, first.gpu, first.gpus_per_node, first.usable_host_gib) == (2, "L4", 4, 100.0)
    assert (second.nodes, second.gpu, second.cores) == (1, None, 4)
    only = cluster_of(nodes, name="ray:x:1", scheduler="ray", gpu="L4", settings={})
    assert len(only.groups) == 1


def test_what_is_missing_is_said() -> None:
    nameless = ray_nodes([row(Resources={"CPU": 8.0, "GPU": 2.0, "memory": 64.0 * GIB})])
    with pytest.raises(ClusterError, match=r"does not say of which type; name the type, as in ray:x:A100-80GB"):
        cluster_of(nameless, name="ray:x", scheduler="ray", gpu=None, settings={})
    with pytest.raises(ClusterError, match="has no node that can take a job now"):
        cluster_of([], name="ray:x", scheduler="ray", gpu=None, settings={})
    with pytest.raises(ClusterError, match="'L44' is not a known GPU type; did you mean 'L4'"):
        cluster_of(nameless, name="ray:x", scheduler="ray", gpu="L44", settings={})


names = st.sampled_from(["CPU", "GPU", "memory", "object_store_memory", "accelerator_type:L4", "node:1.2.3.4", "TPU"])
numbers = st.floats(0, 1e12)


@given(
    st.lists(st.fixed_dictionaries({"Alive": st.booleans(), "Resources": st.dictionaries(names, numbers)}), max_size=5)
)
def test_any_rows_are_nodes_or_none(rows: list[dict[str, Any]]) -> None:
    alive = [r for r in rows if r["Alive"] and r["Resources"].get("CPU")]
    found = ray_nodes(rows)
    assert len(found) == len(alive)
    assert all(n.gpus >= 0 and n.cores >= 1 and n.host_memory_gib >= n.host_reserved_gib for n in found)


PROGRAM = """
import ray, sys
ray.init(num_cpus=3, num_gpus=2, resources={"accelerator_type:T4": 1}, object_store_memory=100_000_000, include_dashboard=False,
         log_to_driver=False, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1")
from trebuchet.launcher.inventory import cluster_of, ray_nodes
group = cluster_of(ray_nodes(ray.nodes()), name="ray:local", scheduler="ray", gpu=None, settings={}).groups[0]
print("FOUND", group.nodes, group.gpus_per_node, group.gpu, group.cores, group.host_memory_gib > 0.5)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_real_local_ray(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("ray")
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(tmp_path_factory.mktemp("h")),
    }
    folder = f"/tmp/r{os.getpid()}"  # short: it holds unix sockets
    command = [sys.executable, "-c", PROGRAM, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert "FOUND 1 2 T4 3 True" in done.stdout, done.stderr[-2000:]


def test_nodes_of_one_kind_that_differ_count_as_their_least() -> None:
    """Ranks in step have what the smallest node gives them; other GPUs, or another number, are another kind."""
    large = Node(gpu="a100", gpus=4, cores=64, host_memory_gib=512.0, host_reserved_gib=16.0)
    small = Node(gpu="A100", gpus=4, cores=48, host_memory_gib=256.0, host_reserved_gib=8.0)
    other = Node(gpu="l4", gpus=4, cores=64, host_memory_gib=512.0)
    group, _ = cluster_of([large, small, large, other], name="x", scheduler="slurm", gpu=None, settings={}).groups
    assert (group.nodes, group.gpu, group.cores, group.usable_host_gib) == (3, "A100-40GB", 48, 248.0)
    assert group.sources["cores"].endswith("the least of nodes that differ")
    only = cluster_of([large, large, other], name="x", scheduler="slurm", gpu="A100-40GB", settings={"partition": "p"})
    assert len(only.groups) == 1 and only.slurm == {"partition": "p", "gpu_type": "a100"}
    same = cluster_of([large, large], name="x", scheduler="slurm", gpu="A100-40GB", settings={"partition": "p"})
    assert same.slurm == {"partition": "p"}  # nothing to choose from, nothing to say
