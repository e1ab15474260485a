"""The inventory of this machine: cores and memory under affinity and cgroups, and what is made of NVML's answers.

Cgroup limits are read from file trees as the kernel lays them out (its documents "cgroup-v2" and "cgroup-v1"); NVML
has no device in these tests, so its answers are given by a stand-in with the numbers of a real card.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from trebuchet.launcher import machine
from trebuchet.launcher.cluster import NodeGroup
from trebuchet.launcher.errors import ClusterError
from trebuchet.launcher.machine import GIB, Gpu

MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_memory_is_the_machines_without_a_limit() -> None:
    total, available = machine.memory_bytes()
    assert total <= psutil.virtual_memory().total
    assert 0 < available <= total


def test_memory_without_cgroups(tmp_path: Path) -> None:
    assert machine.memory_bytes(tree(tmp_path, {})) == (32 * GIB, 16 * GIB)


def test_memory_under_a_cgroup_of_version_2(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/system.slice/job_7/step_0"
    files = {
        "proc/self/cgroup": "0::/system.slice/job_7/step_0",
        f"{job}/memory.max": "max",
        f"{Path(job).parent}/memory.max": str(8 * GIB),
        f"{Path(job).parent}/memory.current": str(6 * GIB),
        f"{Path(job).parent}/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }
    assert machine.memory_bytes(tree(tmp_path, files)) == (8 * GIB, 4 * GIB)


def test_memory_under_a_cgroup_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": str(20 * GIB),
        "sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes": str(1 * GIB),
        "sys/fs/cgroup/memory/slurm/job/memory.stat": "total_inactive_file 0\n",
    }
    assert machine.memory_bytes(tree(tmp_path, files)) == (20 * GIB, 16 * GIB)


def test_a_container_sees_its_own_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../host/path",
        "sys/fs/cgroup/memory.max": str(4 * GIB),
        "sys/fs/cgroup/memory.current": str(3 * GIB),
    }
    assert machine.memory_bytes(tree(tmp_path, files)) == (4 * GIB, 1 * GIB)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "100000 100000", "sys/fs/cgroup/a/b/x": ""}, 1),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/j",
                "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/j/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "5:cpu:/j", "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "-1"}, None),
    ],
)
def test_cores_under_a_quota(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert machine.cores(tree(tmp_path, files)) == min(allowed, cores or allowed)


def test_cores_follow_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from trebuchet.launcher.machine import cores; print(cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def gpu(name: str, uuid: str, *, total: float = 24, free: float = 24) -> Gpu:
    memory, left = int(total * GIB), int(free * GIB)
    return Gpu(name=name, uuid=uuid, memory_bytes=memory, free_bytes=left, capability="8.9", driver="570.1")


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        (None, "abc"),
        ("", ""),
        ("1", "b"),
        ("2,0", "ca"),
        ("0,7,1", "a"),  # CUDA stops at the first invalid entry
        ("-1", ""),
        ("GPU-b", "b"),
        ("GPU-c, GPU-a", "ca"),
        ("GPU-", ""),  # names more than one
    ],
)
def test_visible_devices(setting: str | None, left: str) -> None:
    every = [gpu("NVIDIA L4", f"GPU-{letter}") for letter in "abc"]
    assert "".join(g.uuid[-1] for g in machine.visible(every, setting)) == left


def test_slices_of_a_gpu_are_refused() -> None:
    with pytest.raises(ClusterError, match="MIG-1 is a slice of a GPU"):
        machine.visible([gpu("NVIDIA L4", "GPU-a")], "MIG-1")


class _Nvml:
    """NVML's calls as pynvml spells them, with what an A100 80 GB answers: 80 GiB, 0.84 of them the driver's."""

    NVMLError = RuntimeError
    nvmlMemory_v2 = 2

    def __init__(self, version_2: bool) -> None:
        self.version_2 = version_2

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> SimpleNamespace:
        if version == 2 and not self.version_2:
            raise self.NVMLError("Function Not Found")
        return SimpleNamespace(total=80 * GIB, reserved=int(0.84 * GIB), free=70 * GIB, used=0)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 8, 0

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA A100-SXM4-80GB"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"


def test_the_drivers_share_is_not_offered() -> None:
    found = machine._gpu(_Nvml(True), 0, "570.1")
    assert (found.memory_bytes, found.free_bytes) == (80 * GIB - int(0.84 * GIB), 70 * GIB)
    assert machine._gpu(_Nvml(False), 0, "570.1").memory_bytes == 80 * GIB
    assert (found.name, found.capability) == ("NVIDIA A100-SXM4-80GB", "8.0")


def test_groups_by_type(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [
        gpu("NVIDIA GeForce RTX 4090", "a", total=23.5, free=22.0),
        gpu("NVIDIA GeForce RTX 4090", "b", total=23.5, free=23.4),
        gpu("NVIDIA Q9000", "c", total=47.5, free=47.5),
    ]
    monkeypatch.setattr(machine, "gpus", lambda: here)
    from trebuchet.launcher.cluster import this_machine

    first, second = this_machine().groups
    assert (first.gpu, first.gpus_per_node, first.usable_gpu_gib) == ("RTX-4090", 2, pytest.approx(22.0))
    assert first.peak_tflops["bf16"] == 165.2 and first.sources["gpu_memory_gib"] == "measured by NVML"
    assert (second.gpu, second.gpus_per_node, second.peak_tflops) == ("Q9000", 1, {})


def test_every_name_of_the_table_is_unique() -> None:
    import json

    rows = json.loads(Path(machine.__file__).with_name("gpus.json").read_text())["gpus"]
    names = [name for row in rows.values() for name in row["nvml"]]
    assert len(names) == len(set(names))
    assert machine.gpu_type("NVIDIA A100-SXM4-80GB")[0] == "A100-80GB"
    assert machine.gpu_type("Tesla T4")[0] == "T4"


@pytest.mark.parametrize(
    ("flags", "lacks"), [({"avx2"}, True), ({"avx2", "avx512_bf16"}, False), ({"asimd", "bf16"}, False), (set(), False)]
)
def test_a_cpu_without_bf16_instructions_trains_in_fp32(
    flags: set[str], lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    (group,) = (NodeGroup(**found) for found in machine.inventory())
    assert group.supports("fp32") and group.supports("bf16") != lacks and not group.supports("fp16")
