"""Is this allocation fit to train: asked of every rank together, in the first seconds, before a model is loaded.

Each rank looks at its own GPU, versions, clock, folder and model; then all see all, so that the verdict is the same
everywhere and names the node. Run alone (doctor_job.py) it is the job of `trebuchet doctor --cluster`. Left
out: this machine without other ranks (launcher/doctor.py), and any repair.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..launcher.record import versions, write_atomically
from . import roll_call

UNSEEN = "what another rank wrote there is not seen"
SKEW_S = 5.0  # clocks that differ by more make time limits, file times and logs disagree
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}  # large enough that latency does not count
COMPARED = (
    "python",
    "trebuchet",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "triton",
    "nccl",
    "cuda",
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank found. `folder` and `model` are None when all is well, else what is wrong."""

    rank: int
    node: str
    gpu: str | None
    versions: dict[str, str]
    clock: float
    folder: str | None
    free_bytes: int
    model: str | None


def examine(
    folder: Path, device: torch.device, *, needed_bytes: int = 0, model: Callable[[], Path] | None = None
) -> dict[str, Any]:
    """Collective. `{"problems": [sentence, …], "ranks": […], "all_reduce_gbps": …, "seconds": …}`, the same on every
    rank.

    `model` finds the folder of the weights, offline, and raises what is wrong; `needed_bytes` is what the run will
    write. Bandwidth is that of the bus: bytes x 2 (n-1)/n over seconds, in 10^9 bytes (the convention of nccl-tests).
    """
    began = time.perf_counter()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trace = folder / f".allocation-{rank}"
    written = _write(trace, str(rank))
    _barrier(world)
    clock = time.time()
    seen = Seen(
        rank=rank,
        node=os.environ.get("SLURMD_NODENAME") or platform.node(),
        gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
        versions=_versions(),
        clock=clock,
        folder=written or _read(folder / f".allocation-{(rank + 1) % world}", str((rank + 1) % world)),
        free_bytes=_free_bytes(folder),
        model=_model(model),
    )
    everyone = [seen]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, seen)
        everyone = gathered
    trace.unlink(missing_ok=True)
    found = problems(everyone, needed_bytes=needed_bytes)
    speed = _all_reduce(device, rank, world, found)
    return {
        "problems": found,
        "ranks": [asdict(one) for one in everyone],
        "all_reduce_gbps": speed,
        "seconds": round(time.perf_counter() - began, 3),
    }


def problems(everyone: Sequence[Seen], *, needed_bytes: int = 0) -> list[str]:
    """One sentence per fault, each with the node; empty for a good allocation."""
    out = []
    out += _folders(everyone)
    for one in everyone:
        if one.model:
            out.append(f"{one.node} (rank {one.rank}): the model: {one.model}")
    for node in dict.fromkeys(one.node for one in everyone):
        free = min(one.free_bytes for one in everyone if one.node == node)
        if 0 <= free < needed_bytes:
            have, need = free / 2**30, needed_bytes / 2**30
            out.append(f"{node}: {have:.1f} GiB free where the run folder is, {need:.1f} needed for its checkpoints")
    for gpu, count in Counter(one.gpu for one in everyone if one.gpu).items():
        if count > 1:
            ranks = [one for one in everyone if one.gpu == gpu]
            out.append(f"{ranks[0].node}: ranks {', '.join(str(one.rank) for one in ranks)} have the same GPU {gpu}")
    for name in COMPARED:
        kinds = Counter(one.versions.get(name, "none") for one in everyone)
        usual = kinds.most_common(1)[0][0]
        for node, version in dict.fromkeys((one.node, one.versions.get(name, "none")) for one in everyone):
            if version != usual:
                out.append(f"{node}: {name} {version}, and {usual} elsewhere")
    middle = sorted(one.clock for one in everyone)[len(everyone) // 2]
    for one in everyone:
        if abs(one.clock - middle) > SKEW_S:
            out.append(f"{one.node} (rank {one.rank}): its clock is {one.clock - middle:+.0f} s off")
    return out


def _folders(everyone: Sequence[Seen]) -> list[str]:
    """Who cannot write to the run folder, and who does not share it. Each rank reads the file of the next, so one node with a folder of
    its own is complained of from both sides: by the rank before it, and by its last rank of the one after it."""
    out, unwritten = [], {one.rank for one in everyone if one.folder and not one.folder.startswith(UNSEEN)}
    pairs = []
    for one in everyone:
        following = everyone[(one.rank + 1) % len(everyone)]
        if one.rank in unwritten:
            out.append(f"{one.node} (rank {one.rank}): the run folder: {one.folder}")
        elif one.folder and following.rank not in unwritten:  # what was not written cannot be seen
            pairs.append((one, {one.node, following.node}))
    alone = set.intersection(*(nodes for _, nodes in pairs)) if len(pairs) > 1 else set()
    if len(alone) == 1:
        node = alone.pop()
        return [
            *out,
            f"{node}: the run folder: this node does not see what the others write there; is it on the shared file system?",
        ]
    return out + [f"{one.node} (rank {one.rank}): the run folder: {one.folder}" for one, _ in pairs]


def _free_bytes(folder: Path) -> int:
    """-1 where it cannot be told; the reason is in what writing to the folder gave."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return -1


def _write(path: Path, text: str) -> str | None:
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written to: {error.strerror}"
    return None


def _read(path: Path, expected: str) -> str | None:
    """Another rank's file: a folder that is not the same on all nodes is found here."""
    try:
        return None if path.read_text() == expected else f"{path.name} reads differently than it was written"
    except OSError as error:
        return f"{UNSEEN} ({error.strerror}); is it on the shared file system?"


def _model(find: Callable[[], Path] | None) -> str | None:
    if find is None:
        return None
    try:
        for file in find().glob("*.safetensors"):
            with file.open("rb") as weights:
                weights.read(8)
    except Exception as error:  # whatever it is, this node cannot read the model, and the sentence must say so
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _all_reduce(device: torch.device, rank: int, world: int, found: list[str]) -> float | None:
    """GB/s of the bus on the second of two sums; a wrong sum is a problem of its own."""
    if world == 1:
        return None
    tensor = torch.full((REDUCED_BYTES[device.type] // 4,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == world * (world + 1) / 2).all()):
        found.append(f"an all-reduce over {world} ranks gave another sum than it must")
    _barrier(world)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor([time.perf_counter() - began], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return round(REDUCED_BYTES[device.type] * 2 * (world - 1) / world / float(seconds) / 1e9, 3)


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def _versions() -> dict[str, str]:
    found = versions()
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def report_of(folder: Path) -> int:
    """What the job of `doctor --cluster` does on each rank: the roll call, the examination, FOLDER/report.json. 0 when all is well."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    absent, came = roll_call.call(folder)
    if absent:
        write_atomically(folder / "report.json", json.dumps({"problems": absent, "came": came}, indent=1))
        return 1
    dist.init_process_group("nccl" if gpu else "gloo")
    report = examine(folder, device)
    if dist.get_rank() == 0:
        write_atomically(folder / "report.json", json.dumps(report, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    return 1 if report["problems"] else 0
