"""What every part of a run needs to know about this process: rank, device, folder, plan; sums over ranks; the wish to stop.

Left out: sharding. accelerate gives the process group and the device and nothing more (on a CPU it would not shard, and not say so).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..launcher import stopping
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from .phases import Peaks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .watchdog import Watchdog


@dataclass
class Runtime:
    plan: Plan
    folder: RunFolder
    accelerator: Accelerator
    loading: Watchdog | None = None  # until the first step may be made; none where no worker started this process

    def __post_init__(self) -> None:
        self.memory = Peaks(self.device)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def total(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64; the same numbers on every rank."""
        if self.world == 1:
            return [float(v) for v in values]
        # MPS and some accelerators have no float64; token counts and sums of losses need it only on CPU and CUDA.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [int(v) for v in tensor.tolist()]

    def gathered(self, word: str) -> list[str]:
        """Each rank's word, in the order of the ranks."""
        words = [word] * self.world
        if self.world > 1:
            dist.all_gather_object(words, word)
        return words

    def loads_on(self, *, over: bool = False) -> None:
        """Loading has come on, or is over."""
        if self.loading is not None:
            self.loading.stop() if over else self.loading.beat(0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stopping(self, lead_s: float = 0.0) -> bool:
        """Whether any rank was asked to stop, by signal or by the file RUN/stop, or the job's time ends within `lead_s`; every
        rank gets the same answer."""
        wish = stopping.wished() is not None or (self.main and (self.folder.stop.exists() or time_ends(lead_s)))
        return self.total(float(wish))[0] > 0


def store() -> dist.Store:
    """The key-value store of the process group, which works while a collective hangs."""
    return dist.distributed_c10d._get_default_store()


def time_ends(lead_s: float) -> bool:
    """Whether less than `lead_s` is left of the job's time limit. The scheduler's own warning has a lead that was fixed before a
    step or a save was measured."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return end.isdigit() and time.time() > int(end) - lead_s


def tune_cpu() -> None:
    """Denormals in Adam's second moment cost more than the matrix products of a small model's step (measured: AdamW on 135 M
    parameters is 5 to 10 times slower with them). The allocator's settings must be in the environment before the process
    starts; launcher/local.py puts them there."""
    torch.set_flush_denormal(True)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def current_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
