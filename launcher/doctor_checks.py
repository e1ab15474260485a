"""The checks of `trebuchet doctor`. Each returns findings and raises nothing for a machine that is unfit.

Packages are judged by their metadata against the bounds this package declares; what only a running torch knows comes
from `doctor_probe.py` in a process of its own. Secrets are reported by the name of their variable, never by value.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine
from .doctor import Check
from .errors import ClusterError
from .model_files import cache_root, hf_home

GIB = 2**30
# A 7B model in 16 bits takes 14 GB and a run keeps several checkpoints: below the first number say so, below the second
# not even an adapter can be counted on to fit.
DISK_WARN_GIB, DISK_FAIL_GIB = 20.0, 1.0
SHM_WARN_GIB = 1.0  # containers come with 64 MiB, which data loader workers and NCCL fill
TOKENS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "COMET_API_KEY",
    "SWANLAB_API_KEY",
)
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TRAIN = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "triton")


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(name="python", status="ok", line=f"{version} at {sys.executable}")


def packages() -> Iterator[Check]:
    """Installed versions against this package's lower bounds: the core must be there, the training part should."""
    for name, bound, extra in requirements():
        if extra not in ("", "train"):
            continue
        version = _version(name)
        if version is None:
            if extra == "":
                yield Check(name=name, status="fail", line="not installed", advice=f"pip install '{name}>={bound}'")
            elif name in TRAIN:
                advice = "pip install 'trebuchet[train]' to train here; planning and submitting work without"
                yield Check(name=name, status="warn", line="not installed", advice=advice)
            continue
        if version_key(version) < version_key(bound):
            line, advice = f"{version}, needs {bound} or newer", f"pip install -U '{name}>={bound}'"
            yield Check(name=name, status="fail", line=line, advice=advice)
        elif name in TRAIN:
            yield Check(name=name, status="ok", line=version)


def requirements() -> list[tuple[str, str, str]]:
    """(name, lower bound, extra) of every requirement this package declares; the extra is empty for the core."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    if source.is_file():  # a checkout: what it says now, which may be newer than what was noted when it was installed
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        declared = list(project["dependencies"])
        for extra, names in project["optional-dependencies"].items():
            declared += [f"{name.split(';')[0]}; extra == '{extra}'" for name in names]
    else:
        declared = metadata.requires("trebuchet") or []
    out = []
    for text in declared:
        head = re.match(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?>=\s*([\w.]+)", text)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        if head:
            out.append((head[1], head[2], extra[1] if extra else ""))
    return out


def version_key(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without what follows them: 2.13.0+cpu -> (2, 13); enough for a lower bound."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def gpus() -> tuple[list[machine.Gpu], Check]:
    """The GPUs the driver shows to this process, and what is wrong with that."""
    try:
        found = machine.gpus()
    except ClusterError as error:
        return [], Check(name="gpus", status="fail", line="not readable", advice=str(error))
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        note = f" (CUDA_VISIBLE_DEVICES is '{hidden}')" if hidden is not None else ""
        return [], Check(name="gpus", status="ok", line=f"none{note}: training runs on the CPU")
    names = ", ".join(f"{g.name} {g.memory_bytes / GIB:.1f} GiB" for g in found)
    line = f"{len(found)}: {names}; driver {found[0].driver}"
    busy = [i for i, gpu in enumerate(found) if gpu.memory_bytes - gpu.free_bytes > GIB]
    if busy:
        used = ", ".join(f"GPU {i}: {(found[i].memory_bytes - found[i].free_bytes) / GIB:.1f} GiB" for i in busy)
        advice = f"other processes hold memory ({used}); `nvidia-smi` names them"
        return found, Check(name="gpus", status="warn", line=line, advice=advice)
    return found, Check(name="gpus", status="ok", line=line)


def torch_stack(devices: list[machine.Gpu], timeout_s: float) -> list[Check]:
    """What torch, Triton and bitsandbytes say when imported and asked to compute, in a process of their own."""
    if _version("torch") is None:
        return []  # packages() has said so
    command = [sys.executable, "-P", str(Path(__file__).with_name("doctor_probe.py"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        advice = "a file system that hangs or a driver in trouble; try `python -c 'import torch'` by hand"
        return [Check(name="torch runs", status="fail", line=f"no answer within {timeout_s:.0f} s", advice=advice)]
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        advice = "install torch again from the index that fits the driver"
        return [Check(name="torch runs", status="fail", line=f"exit code {done.returncode}: {last}", advice=advice)]
    return [_torch(facts["torch"], devices), *_others(facts, bool(devices))]


def _torch(facts: dict[str, Any], devices: list[machine.Gpu]) -> Check:
    name = "torch runs"
    if facts.get("error"):
        return Check(name=name, status="fail", line=facts["error"], advice="install torch again")
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    line = f"{facts['version']}, built for {build}, {facts['threads']} threads"
    if devices and not facts["cuda"]:
        advice = "this torch cannot use the GPUs; install a CUDA build of it"
        return Check(name=name, status="fail", line=line, advice=advice)
    if devices and facts["devices"] < len(devices):
        line += f", sees {facts['devices']} of {len(devices)} GPUs"
        advice = f"driver {devices[0].driver} may be too old for CUDA {facts['cuda']}; update it, or use an older torch"
        return Check(name=name, status="fail", line=line, advice=advice)
    if facts.get("gpu_error"):
        advice = "install a torch build for this GPU"
        return Check(name=name, status="fail", line=f"{line}: {facts['gpu_error']}", advice=advice)
    return Check(name=name, status="ok", line=line)


def _others(facts: dict[str, Any], gpu: bool) -> Iterator[Check]:
    """Triton and bitsandbytes, where they are installed."""
    wanted = {"triton": "the kernel layer needs it on a GPU", "bitsandbytes": "qlora and 8-bit optimizers need it"}
    for name, why in wanted.items():
        fact = facts.get(name)
        if fact is None:
            continue
        if fact.get("error"):
            advice = f"{why}; install it again"
            yield Check(name=f"{name} runs", status="fail" if gpu else "warn", line=fact["error"], advice=advice)
        else:
            yield Check(name=f"{name} runs", status="ok", line=fact["line"])
    if gpu and not any(shutil.which(compiler) for compiler in (os.environ.get("CC") or "cc", "gcc", "clang")):
        advice = "Triton builds a small launcher in C the first time; install gcc, or ship a filled TRITON_CACHE_DIR"
        yield Check(name="compiler", status="warn", line="no C compiler", advice=advice)


def processors() -> Check:
    """Cores and memory as this process may use them."""
    total, available = machine.memory_bytes()
    cores, every = machine.cores(), os.cpu_count() or 1
    line = f"{cores} of {every} cores, {available / GIB:.1f} of {total / GIB:.1f} GiB free"
    if available < 4 * GIB:
        advice = "a model is read through host memory; 4 GiB is little even for one of 1B parameters"
        return Check(name="host", status="warn", line=line, advice=advice)
    return Check(name="host", status="ok", line=line)


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    name = "shared memory"
    if not path.is_dir():
        return Check(name=name, status="ok", line=f"no {path} on this system")
    usage = shutil.disk_usage(path)
    line = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {path}"
    if usage.free < SHM_WARN_GIB * GIB:
        advice = "data loader workers and NCCL use it; start the container with --shm-size=8g or --ipc=host"
        return Check(name=name, status="warn", line=line, advice=advice)
    return Check(name=name, status="ok", line=line)


def writing(folder: Path) -> Check:
    """Writes 1 MiB, syncs, renames and removes it: what a checkpoint does and a full or read-only disk refuses."""
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=".trebuchet-doctor-", dir=folder) as scratch:
            path = Path(scratch) / "new"
            with path.open("wb") as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
            path.rename(Path(scratch) / "done")
    except OSError as error:
        advice = "run where files can be written, or give another output folder"
        return Check(name="writing", status="fail", line=f"{folder}: {error.strerror}", advice=advice)
    took = time.perf_counter() - start
    line = f"1 MiB written and synced in {took * 1000:.0f} ms in {folder}"
    if took > 5:
        return Check(
            name="writing", status="warn", line=line, advice="this file system is slow; checkpoints will be too"
        )
    return Check(name="writing", status="ok", line=line)


def disk(folder: Path) -> Iterator[Check]:
    """Free space where runs go and where models are cached."""
    for name, path in (("disk for runs", folder), ("disk for models", cache_root())):
        here = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(here).free / GIB
        line = f"{free:.1f} GiB free for {path}"
        status = "fail" if free < DISK_FAIL_GIB else "warn" if free < DISK_WARN_GIB else "ok"
        advice = "free some space, or move it (--set output=…, HF_HOME)" if status != "ok" else ""
        yield Check(name=name, status=status, line=line, advice=advice)  # type: ignore[arg-type]


def hub() -> Check:
    """Where models come from: the cache and whether the Hub may be asked."""
    flags = [f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name)]
    cached = len(list(cache_root().glob("models--*"))) if cache_root().is_dir() else 0
    hub = f"offline ({', '.join(flags)})" if flags else "the Hub may be asked"
    return Check(name="hugging face", status="ok", line=f"cache {cache_root()} with {cached} models; {hub}")


def tokens() -> Check:
    """Which secrets are set, by name."""
    found = [name for name in TOKENS if os.environ.get(name)]
    if (hf_home() / "token").is_file():
        found.append(f"{hf_home() / 'token'} (file)")
    return Check(name="tokens", status="ok", line=", ".join(found) or "none set; gated models and W&B need theirs")


def schedulers() -> Iterator[Check]:
    """Slurm and Ray: whether they are here, and whether Slurm's controller answers."""
    if not shutil.which("sbatch"):
        yield Check(name="slurm", status="ok", line="not on this machine")
    elif (nodes := _output("sinfo", "--noheader", "--format=%D %t")) is None:
        line = f"{_output('sbatch', '--version') or 'sbatch found'}, no answer from sinfo"
        yield Check(name="slurm", status="warn", line=line, advice="ask the controller by hand; `sinfo` says why")
    else:
        states = ", ".join(nodes.splitlines()) or "none"
        yield Check(name="slurm", status="ok", line=f"{_output('sbatch', '--version')}; nodes: {states}")
    yield Check(name="ray", status="ok", line=_version("ray") or "not installed")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
