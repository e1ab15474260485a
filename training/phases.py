"""Peak memory of each phase of a run as it happens: load, forward and backward, optimizer step, checkpoint save.

The planner predicts each of them (`strategies/memory.py`), and the report shows both. On a GPU a peak is PyTorch's allocated bytes,
reset where a phase begins; the allocator counts when the host asks for memory, so nothing has to be waited for. On a CPU it is the
high-water mark of the process's resident memory, which Linux resets through /proc/self/clear_refs (proc(5)); where that cannot
be done there is one mark for the whole run and none by phase, and the record says so. On a CPU a change of phase costs
about 0.25 ms (measured, a loaded server core).

What a forward pass freed stays resident in the C library, so an optimizer step or a save after it would show the pass again.
Before the first few of each, freed memory goes back to the system (malloc_trim(3), of glibc) and only these are counted: they
all hold the same, and giving back and taking again at every step would cost time. Left out: what a save in the background
holds while the next steps run.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

PHASES = ("load", "forward_backward", "optimizer_step", "checkpoint_save")  # the planner's names
OTHER = "other"  # data, evaluation, answers, export
SMALLER = {"optimizer_step", "checkpoint_save"}  # phases that follow a larger one
COUNTED = 3  # of each of these on a CPU, the step that makes the optimizer's states among them
GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks:
    """Of one process. `enter(phase)` closes the phase before it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.now = OTHER
        self.by_phase: dict[str, int] = {}
        self.before_bytes = 0  # when loading began: the libraries, on a CPU
        self.whole = 0
        self.apart = reset(device)
        self.gives_back = device.type == "cpu" and give_back()
        self.entered: dict[str, int] = {}
        self.counts = True  # whether the peak of the phase that is now is taken

    def enter(self, phase: str) -> None:
        peak = peak_bytes(self.device)
        self.whole = max(self.whole, peak)
        if self.apart:
            if self.counts:
                self.by_phase[self.now] = max(peak, self.by_phase.get(self.now, 0))
            self.counts = True
            if self.gives_back and phase in SMALLER:
                self.entered[phase] = self.entered.get(phase, 0) + 1
                self.counts = self.entered[phase] <= COUNTED and give_back()
            reset(self.device)
        if phase == "load":
            self.before_bytes = peak_bytes(self.device)
        self.now = phase

    def largest_bytes(self) -> int:
        """Of the whole run so far."""
        self.whole = max(self.whole, peak_bytes(self.device))
        return self.whole

    def values(self) -> list[int]:
        """One number per phase of PHASES, 0 where it has not been; and what was there before."""
        return [*(self.by_phase.get(phase, 0) for phase in PHASES), self.before_bytes]

    def facts(self, values: list[int]) -> dict[str, Any]:
        """What stands in the record, of `values` that may be the largest over ranks."""
        *peaks, before = (round(value / GIB, 4) for value in values)
        return {
            "what": "allocated" if self.device.type == "cuda" else "resident",
            "by_phase": self.apart,
            "given_back": self.gives_back,
            "before_gib": before,
            "phases_gib": {phase: gib for phase, gib in zip(PHASES, peaks, strict=True) if gib},
        }


def peak_bytes(device: torch.device) -> int:
    """Since the last `reset`, or the start: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> bool:
    """Memory that was freed goes from the C library to the system; False where the library has no way to do that (not glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)  # 1 where something was given back, 0 where there was nothing
    return True


def reset(device: torch.device) -> bool:
    """The mark down to what is held now; False where the system has no way to do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
