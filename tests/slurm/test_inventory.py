"""What a partition has, by Slurm's own words: the parsers against any text, and against a real Slurm."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher import api, cli, record
from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.errors import ClusterError
from trebuchet.launcher.inventory import Node, cluster_of, gpu_named
from trebuchet.launcher.run_folder import open_run
from trebuchet.slurm import inventory

from .cluster import SlurmCluster

# One line of `scontrol show node --oneliner`, Slurm 22.05, as it is printed.
LINE = (
    "NodeName=gpu01 Arch=x86_64 CoresPerSocket=32 CPUAlloc=0 CPUEfctv=126 CPUTot=128 CPULoad=0.10 AvailableFeatures=a100,ib "
    "ActiveFeatures=a100,ib Gres=gpu:a100:8(S:0-1) NodeAddr=gpu01 NodeHostName=gpu01 Version=22.05.8 "
    "OS=Linux 5.14.0-284.11.1.el9_2.x86_64 #1 SMP PREEMPT_DYNAMIC Tue May 9 17:09:15 UTC 2023 RealMemory=1031000 AllocMem=0 "
    "FreeMem=981234 Sockets=2 Boards=1 CoreSpecCount=1 CPUSpecList=63,127 MemSpecLimit=16384 State=IDLE+CLOUD ThreadsPerCore=2 "
    "TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A Partitions=gpu,long BootTime=2026-01-01T00:00:00 Comment=rack 7, row=3"
)


def test_a_printed_line() -> None:
    (row,) = inventory.records(LINE)
    assert row["OS"].endswith("UTC 2023") and row["Partitions"] == "gpu,long" and inventory.takes_jobs(row)
    node = inventory.node_of(row)
    assert node == Node(gpu="a100", gpus=8, cores=128, host_memory_gib=1031000 / 1024, host_reserved_gib=16.0)
    group = cluster_of(
        [node, node], name="slurm:gpu", scheduler="slurm", gpu=None, settings={"partition": "gpu"}
    ).groups[0]
    assert (group.nodes, group.gpu, group.gpus_per_node) == (2, "A100-40GB", 8)  # the smaller of what "a100" may be
    assert group.sources["host_memory_gib"].startswith("measured")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:a100:4", {"a100": 4}),
        ("gpu:4", {None: 4}),
        ("gpu", {None: 1}),
        ("gpu:h100", {"h100": 1}),
        ("gpu:a100:2(S:0),gpu:a100:2(S:1),shard:8,nic:2", {"a100": 4}),
        ("gpu:nvidia_a100_80gb_pcie:2(IDX:0-1)", {"nvidia_a100_80gb_pcie": 2}),
        ("(null)", {}),
        ("", {}),
        ("gpu:t4:0", {}),
        ("gpu:a100:no_consume:4", {"no_consume": 4}),
    ],
)
def test_gres(text: str, found: dict[str | None, int]) -> None:
    assert inventory.gres(text) == found


words = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=8).filter(
    lambda w: not w.isdigit() and not w[:-1].isdigit()
)
parts = st.tuples(st.none() | words, st.integers(1, 64), st.sampled_from(["", "(S:0-1)", "(S:0,2)", "(IDX:0-3)"]))


@given(st.lists(parts, max_size=5))
def test_any_gres_comes_back(items: list[tuple[str | None, int, str]]) -> None:
    text = ",".join(f"gpu:{kind + ':' if kind else ''}{count}{tail}" for kind, count, tail in items)
    expected: dict[str | None, int] = {}
    for kind, count, _ in items:
        expected[kind] = expected.get(kind, 0) + count
    assert inventory.gres(text) == expected


keys = st.text(string.ascii_letters, min_size=1, max_size=8)
values = st.text(string.ascii_letters + string.digits + " .:-#()[],/*", max_size=20).map(str.strip)


@given(st.lists(st.dictionaries(keys, values, min_size=1, max_size=6), max_size=4))
def test_any_record_comes_back(rows: list[dict[str, str]]) -> None:
    text = "\n".join(" ".join(f"{key}={value}" for key, value in row.items()) for row in rows)
    assert inventory.records(text) == rows


@given(st.text(max_size=80))
def test_no_text_breaks_the_parsers(text: str) -> None:
    inventory.gres(text)
    for row in inventory.records(text):
        inventory.takes_jobs(row)


@pytest.mark.parametrize(
    ("state", "takes"),
    [("IDLE", True), ("MIXED+CLOUD", True), ("ALLOCATED", True), ("IDLE*", True), ("DOWN*", False), ("IDLE+DRAIN", False),
     ("DRAINED", False), ("MIXED+MAINTENANCE", False), ("IDLE+NOT_RESPONDING", False)],
)  # fmt: skip
def test_states(state: str, takes: bool) -> None:
    assert inventory.takes_jobs({"State": state}) is takes


@pytest.mark.parametrize(
    ("word", "name"),
    [("a100", "A100-40GB"), ("A100-80GB", "A100-80GB"), ("nvidia_a100_80gb_pcie", "A100-80GB-PCIe"), ("h100", "H100"), ("t4", "T4"),
     ("rtx_4090", "RTX-4090"), ("tesla_t4", "T4"), ("l4", "L4"), ("A100-80G", "A100-80GB"), ("quantum", None)],
)  # fmt: skip
def test_names_of_gpus(word: str, name: str | None) -> None:
    assert gpu_named(word) == name


def test_a_real_partition(slurm: SlurmCluster) -> None:
    """Four nodes of 8 cores and 64,000 MiB with two GPUs whose Gres names no type."""
    with pytest.raises(ClusterError, match=r"does not say of which type.*slurm:low:A100-80GB"):
        load_cluster("slurm:low")
    cluster = load_cluster("slurm:low:L4")
    (group,) = cluster.groups
    assert (cluster.scheduler, cluster.slurm["partition"], cluster.slurm["time"]) == ("slurm", "low", "01:00:00")
    assert (group.nodes, group.gpus_per_node, group.gpu, group.cores) == (4, 2, "L4", 8)
    assert group.host_memory_gib == pytest.approx(64000 / 1024, abs=0.01)
    with pytest.raises(ClusterError, match=r"no partition 'lwo'; did you mean 'low'"):
        load_cluster("slurm:lwo")
    slurm.ask("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=test")
    try:
        assert load_cluster("slurm:low:L4").groups[0].nodes == 3
    finally:
        slurm.ask("scontrol", "update", "NodeName=n4", "State=RESUME")


def test_a_partition_with_several_kinds_of_gpus(
    slurm: SlurmCluster, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan is for one kind: the partition alone is refused, with the kind named Slurm is asked for that kind and no other; a cluster
    file that leaves it to Slurm is refused before anything is written."""
    assert {(group.gpu, group.nodes) for group in load_cluster("slurm:mixed").groups} == {("A100-40GB", 1), ("L4", 1)}
    with pytest.raises(ClusterError, match=r"several kinds of nodes.*as in slurm:mixed:"):
        api.plan(tiny_config(output=str(tmp_path / "both")), cluster="slurm:mixed")
    slurm.ask("scontrol", "update", "PartitionName=mixed", "State=DOWN")  # jobs wait
    try:
        handle = api.submit(tiny_config(output=str(tmp_path / "one")), cluster="slurm:mixed:L4").handle
        job = slurm.ask("scontrol", "show", "job", handle.rpartition("/")[2])
        assert "JobState=PENDING" in job and "TresPerNode=gres:gpu:l4:2" in job
        assert cli.main(["cancel", str(tmp_path / "one")]) == 0
    finally:
        slurm.ask("scontrol", "update", "PartitionName=mixed", "State=UP")
    assert record.read(open_run(str(tmp_path / "one")))["state"] == "CANCELLED"
    group = {"nodes": 1, "gpus_per_node": 2, "gpu": "L4", "host_memory_gib": 62, "cores": 8}
    file = tmp_path / "loose.yaml"
    file.write_text(yaml.safe_dump({"scheduler": "slurm", "groups": [group], "slurm": {"partition": ["low", "mixed"]}}))
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny_config(output=str(tmp_path / "loose"))))
    capsys.readouterr()
    assert cli.main(["submit", str(tmp_path / "t.yaml"), "--cluster", str(file)]) == 2
    assert "partition mixed has a100 GPUs too (n5), and the plan is for L4" in capsys.readouterr().err
    assert not (tmp_path / "loose").exists()
