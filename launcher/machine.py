"""What this machine offers to this process: GPUs through NVML, cores within the affinity mask and the cgroup, memory
likewise.

Standard library and, where it is installed, pynvml; no torch. Left out: AMD GPUs, which NVML does not know (describe
such machines in a cluster file).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ClusterError

GIB = 2**30
UNLIMITED = 1 << 60  # version 1 cgroups write a number near 2^63 for "no limit"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible device: `memory_bytes` is what processes can have of it, `free_bytes` what is left of that now."""

    name: str
    uuid: str
    memory_bytes: int
    free_bytes: int
    capability: str
    driver: str


def inventory() -> list[dict[str, Any]]:
    """Keys of `NodeGroup`s of this machine: one group per GPU type, or one without GPUs."""
    total, available = memory_bytes()
    host: dict[str, Any] = {
        "nodes": 1,
        "cores": cores(),
        "host_memory_gib": round(total / GIB, 2),
        "host_reserved_gib": round((total - available) / GIB, 2),
    }
    measured = {key: "measured on this machine" for key in ("cores", "host_memory_gib", "host_reserved_gib")}
    found = gpus()
    if not found:
        if lacks_bf16(cpu_flags()):
            host["capability"] = "fp32"
            measured["capability"] = "measured on this machine"
        return [{**host, "sources": measured}]
    groups = []
    for name in dict.fromkeys(gpu.name for gpu in found):
        same = [gpu for gpu in found if gpu.name == name]
        kind, known = gpu_type(name)
        here = {
            "gpu": kind,
            "gpus_per_node": len(same),
            "gpu_memory_gib": round(min(g.memory_bytes for g in same) / GIB, 2),
            "gpu_reserved_gib": round(max(g.memory_bytes - g.free_bytes for g in same) / GIB, 2),
            "capability": same[0].capability,
        }
        sources = known.get("sources", {}) | measured | {key: "measured by NVML" for key in here}
        groups.append({**known, **here, **host, "sources": sources})
    return groups


def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets as Linux spells them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ())
    )


def lacks_bf16(flags: frozenset[str]) -> bool:
    """Whether bf16 products would be emulated: 5 to 15 GFLOP/s against 40 to 100 in fp32 on two cores of an EPYC with AVX2 (torch
    2.13, measured), which made a step of a 135 M model take minutes. Unknown flags are no reason to think so."""
    return bool(flags) and not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def gpu_type(nvml_name: str) -> tuple[str, dict[str, Any]]:
    """Our name of a device and its data sheet; its own name and nothing for a type that is not in `gpus.json`."""
    rows = json.loads((Path(__file__).parent / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    plain = nvml_name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    for name, row in rows.items():
        if plain in row["nvml"]:
            return name, {k: v for k, v in row.items() if k != "nvml"}
    return plain, {}


def gpus() -> list[Gpu]:
    """The NVIDIA devices that CUDA_VISIBLE_DEVICES leaves, in its order. Raises ClusterError when there are devices and
    no pynvml to ask, or a driver that does not answer."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return []
    try:
        import pynvml
    except ImportError:
        raise ClusterError(
            "this machine has an NVIDIA driver and pynvml is missing: pip install nvidia-ml-py"
        ) from None
    try:
        pynvml.nvmlInit()
        try:
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            every = [_gpu(pynvml, handle, driver) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ClusterError(f"the NVIDIA driver does not answer ({error}); `nvidia-smi` shows why") from None
    return visible(every, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(every: list[Gpu], setting: str | None) -> list[Gpu]:
    """Applies CUDA_VISIBLE_DEVICES: indices or starts of UUIDs; as in CUDA, the first invalid entry ends the list."""
    if setting is None:
        return every
    out: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-"):
            raise ClusterError(f"{entry} is a slice of a GPU, whose size NVML tells another way; write a cluster file")
        if entry.isdigit():
            match = every[int(entry) : int(entry) + 1]
        else:
            match = [gpu for gpu in every if entry and gpu.uuid.startswith(entry)]
        if len(match) != 1:
            break
        out += match
    return out


def _gpu(nvml: Any, handle: Any, driver: str) -> Gpu:
    try:  # only the second version of the call tells the driver's own share, which no process can have
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        usable = memory.total - memory.reserved
    except (nvml.NVMLError, AttributeError, TypeError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        usable = memory.total
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=usable,
        free_bytes=min(memory.free, usable),
        capability=f"{major}.{minor}",
        driver=driver,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def cores(root: Path = Path("/")) -> int:
    """Processors this process may run on: the affinity mask, cut by the CPU quota of its cgroups, at least 1."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [mask]
    for folder in _cgroups(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(math.ceil(int(words[0]) / int(words[1])))
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min(quotas))


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes of host memory for this process: /proc/meminfo, cut by the limits of its cgroups."""
    info = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in info:
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    total, available = (int(info[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for folder in _cgroups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read(folder / limit_file), _read(folder / usage_file)
            if not limit.isdigit() or int(limit) >= UNLIMITED:
                continue
            total = min(total, int(limit))
            if usage.isdigit():  # file cache counts as usage and is given back under pressure
                used = max(0, int(usage) - _inactive_file(folder))
                available = min(available, max(0, int(limit) - used))
    return total, min(available, total)


def _inactive_file(folder: Path) -> int:
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders for a controller, from its own up to the root, in both versions of the file system.
    Inside a container the path of /proc/self/cgroup may not exist; its root then is the container's own limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" if number == "0" else root / "sys/fs/cgroup" / controller
        here = base / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder.is_relative_to(base))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
