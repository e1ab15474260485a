"""Cluster files: every shipped one loads and names its sources, wrong ones name the key, the GPU table is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.cluster import Cluster, build_cluster, cluster_names, gpu_types, load_cluster, this_machine
from trebuchet.launcher.errors import ClusterError

SHAPES = {  # name -> nodes, GPUs per node, GPU type
    "a100-40gb-8": (1, 8, "A100-40GB"),
    "a100-80gb-1": (1, 1, "A100-80GB-PCIe"),
    "a100-80gb-8": (1, 8, "A100-80GB"),
    "a100-80gb-16": (2, 8, "A100-80GB"),
    "h100-8": (1, 8, "H100"),
    "h100-64": (8, 8, "H100"),
    "l4-4": (1, 4, "L4"),
    "rtx3090-2x24gb": (1, 2, "RTX-3090"),
    "rtx4090-1": (1, 1, "RTX-4090"),
    "rtx4090-2x24gb": (1, 2, "RTX-4090"),
    "slurm-template": (2, 4, "A100-80GB"),
    "t4-1": (1, 1, "T4"),
}
GROUP: dict[str, Any] = {"gpus_per_node": 2, "gpu": "L4", "host_memory_gib": 64, "cores": 16}


def build(tree: Any) -> Cluster:
    return build_cluster(tree, source="f.yaml", default_name="f")


def problem(tree: Any) -> str:
    with pytest.raises(ClusterError) as caught:
        build(tree)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_shapes_cover_the_folder() -> None:
    assert {*SHAPES, "local"} <= set(cluster_names())


@pytest.mark.parametrize("name", cluster_names())
def test_every_shipped_file_loads_and_says_where_each_number_is_from(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster
    for group in cluster.groups:
        numbers = {k for k, v in group.model_dump(exclude_defaults=True).items() if k not in ("gpu", "sources")}
        assert numbers - {"nodes", "gpus_per_node"} <= set(group.sources)
    if name in SHAPES:
        (group,) = cluster.groups
        assert (group.nodes, group.gpus_per_node, group.gpu) == SHAPES[name]
        assert (group.inter_node_gbps is not None) == (group.nodes > 1)
        assert cluster.gpus == group.nodes * group.gpus_per_node


def test_local_is_this_machine() -> None:
    assert load_cluster("local").groups[0].cores == this_machine().groups[0].cores


@pytest.mark.parametrize("name", gpu_types())
def test_every_gpu_type_is_whole(name: str) -> None:
    group = build({"groups": [{**GROUP, "gpu": name}]}).groups[0]
    known = gpu_types()[name]
    assert set(known["sources"]) == set(known) - {"sources"}
    assert known["sources"]["gpu_memory_gib"].startswith("measured")
    assert known["sources"]["peak_tflops"].startswith("data sheet")
    assert group.usable_gpu_gib == known["gpu_memory_gib"]
    # tensor cores before Ampere (8.0) have no bf16; all of these have fp16
    old = known["capability"] in ("7.0", "7.5")
    assert group.supports("bf16") == (not old) and group.supports("fp16") and group.supports("fp32")
    assert known["peak_tflops"]["fp16"] > known["peak_tflops"]["fp32"]


def test_keys_of_the_file_win_over_the_type() -> None:
    group = build(
        {"groups": [{**GROUP, "intra_node_gbps": 7, "sources": {"intra_node_gbps": "measured with iperf"}}]}
    ).groups[0]
    assert (group.intra_node_gbps, group.memory_bandwidth_gbps) == (7, 300)
    assert group.sources["intra_node_gbps"] == "measured with iperf"
    own = {**GROUP, "gpu": "H20", "gpu_memory_gib": 95.0, "peak_tflops": {"bf16": 148}}
    assert build({"groups": [own]}).groups[0].usable_gpu_gib == 95


def test_reserved_memory_is_taken_off() -> None:
    group = build({"groups": [{**GROUP, "gpu_reserved_gib": 2.5, "host_reserved_gib": 10}]}).groups[0]
    assert (group.usable_gpu_gib, group.usable_host_gib) == (pytest.approx(19.53), 54)
    cpu = build({"groups": [{"host_memory_gib": 64, "cores": 16}]}).groups[0]
    assert (cpu.usable_gpu_gib, cpu.gpus, cpu.supports("bf16"), cpu.supports("fp16")) == (0, 0, True, False)


@pytest.mark.parametrize(
    ("capability", "peak", "bf16", "fp16"),
    [("9.0", {}, True, True), ("7.5", {}, False, True), ("gfx942", {}, True, True), (None, {"fp16": 1}, False, True)],
)
def test_dtypes_of_a_gpu_that_is_not_in_the_table(
    capability: str | None, peak: dict[str, float], bf16: bool, fp16: bool
) -> None:
    own = {**GROUP, "gpu": "own", "gpu_memory_gib": 40, "capability": capability, "peak_tflops": peak}
    group = build({"groups": [own]}).groups[0]
    assert (group.supports("bf16"), group.supports("fp16")) == (bf16, fp16)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"groups": [{**GROUP, "gpus_per_nod": 2}]},
            "groups.0.gpus_per_nod: unknown key; did you mean 'gpus_per_node'?",
        ),
        ({"groups": [GROUP], "sheduler": "slurm"}, "sheduler: unknown key; did you mean 'scheduler'?"),
        ({"groups": [GROUP], "scheduler": "pbs"}, "scheduler: must be 'local', 'slurm' or 'ray', not 'pbs'"),
        ({"groups": [{**GROUP, "cores": "many"}]}, "groups.0.cores: must be a whole number, not 'many'"),
        ({"groups": [{**GROUP, "cores": 0}]}, "groups.0.cores: must be greater than or equal to 1, not 0"),
        ({"groups": [{k: v for k, v in GROUP.items() if k != "cores"}]}, "groups.0.cores: missing"),
        (
            {"groups": [{**GROUP, "gpu": "A100-80"}]},
            "groups.0.gpu: 'A100-80' is not a known type; did you mean 'A100-80GB'?",
        ),
        ({"groups": [{**GROUP, "gpus_per_node": 0}]}, "groups.0: gpu and gpus_per_node go together"),
        ({"groups": [{**GROUP, "gpu_reserved_gib": 30}]}, "groups.0: gpu_reserved_gib leaves nothing"),
        ({"groups": [{**GROUP, "host_reserved_gib": 64}]}, "groups.0: host_reserved_gib leaves nothing"),
        (
            {"groups": [{**GROUP, "peak_tflops": {"bf17": 1}}]},
            "groups.0: peak_tflops holds positive numbers for some of bf16",
        ),
        ({"groups": [{**GROUP, "sources": {"cores": "a guess"}}]}, "groups.0: sources.cores: a key of the group"),
        ({"groups": []}, "groups: must be"),
        ({"scheduler": "local"}, "groups: missing"),
        ([], "a cluster file holds keys and values"),
    ],
)
def test_wrong_files_name_the_key(tree: Any, message: str) -> None:
    text = problem(tree)
    assert text.startswith(f"f.yaml: {message}") and "\n" not in text


def test_all_problems_at_once() -> None:
    text = problem({"groups": [{**GROUP, "cores": "x", "colour": 1}], "nodes": 3})
    assert text.splitlines()[0] == "f.yaml: 3 problems:" and len(text.splitlines()) == 4


def test_the_example_of_the_manual_loads() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models-and-clusters.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    cluster = build(yaml.safe_load(example))
    assert (cluster.scheduler, cluster.gpus) == ("slurm", 16)


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no cluster 'h100-6' in cluster_configs/; did you mean 'h100-64'"):
        load_cluster("h100-6")
    with pytest.raises(ClusterError, match=r"cannot read the cluster file .*gone\.yaml: No such file"):
        load_cluster(str(tmp_path / "gone.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("scheduler: local\ngroups: [{]\n")
    with pytest.raises(ClusterError, match=r"bad\.yaml: line 2: not valid YAML"):
        load_cluster(str(bad))
    good = tmp_path / "my site.yaml"
    good.write_text(yaml.safe_dump({"groups": [GROUP], "slurm": {"account": "x"}, "scheduler": "slurm"}))
    loaded = load_cluster(str(good))
    assert (loaded.name, loaded.slurm) == ("my site", {"account": "x"})


keys = st.sampled_from(["name", "scheduler", "groups", "slurm", "ray", "nodes", "x"])
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["L4", "local"])
)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from([*GROUP, "y"]), v))


@given(st.dictionaries(keys, values))
def test_any_mapping_is_a_cluster_or_a_cluster_error(tree: dict[str, Any]) -> None:
    try:
        cluster = build(tree)
    except ClusterError as error:
        assert str(error).startswith("f.yaml: ")
    else:
        assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster


def test_this_machine_is_read_without_torch_and_without_a_program() -> None:
    """What it could cost: torch's import takes seconds, `nvidia-smi` up to one per call. (6 ms measured on 2 cores without a GPU.)"""
    code = (
        "import sys; from trebuchet.launcher.cluster import this_machine\n"
        "started = []\n"
        "sys.addaudithook(lambda event, args: started.append(args[0]) if event in ('subprocess.Popen', 'os.system') else None)\n"
        "this_machine()\n"
        "print('torch' in sys.modules, started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False []\n"
