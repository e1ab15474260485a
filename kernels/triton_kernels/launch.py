"""How every kernel of this folder is started: device guard, empty grids, 2-D row views, and recording for tests.

Launch settings come from `launch_table`; nothing is tuned at run time. Leaves out the kernels.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import ROW_WARPS


@dataclass(frozen=True)
class Launch:
    """One recorded start of a kernel: what the JIT would be given."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


@triton.jit
def load_fp32(ptr, mask, EVEN: tl.constexpr):
    """Load and widen; EVEN says that every lane is inside, and saves the predicates."""
    if EVEN:
        value = tl.load(ptr)
    else:
        value = tl.load(ptr, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def exp(x):
    """e^x through exp2, which flushes results below 1e-38: `tl.exp` keeps them, at four more instructions an element."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); the reciprocal as the square of rsqrt, one instruction where a division takes eight or more."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def store_as(ptr, value, mask, EVEN: tl.constexpr):
    """Round to the dtype of the target and store."""
    if EVEN:
        tl.store(ptr, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them: what ahead-of-time compilation starts from. Outputs stay unwritten."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def start(kernel: Any, programs: int, *args: Any, warps: int, registers: int | None = None, **options: Any) -> None:
    """Run `kernel` on a grid of `programs` (one axis, so no 65,535 limit) on the device of its first tensor. `registers`
    bounds those of a thread (NVIDIA only; Triton's ROCm backend has no such option)."""
    options["num_warps"] = warps
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    # Triton 3.10 changes the default; what is fused decides rounding, so it is said here.
    options.setdefault("enable_fp_fusion", True)
    if _recorded is not None:
        _recorded.append(Launch(kernel, (programs,), args, options))
    elif programs > 0:
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](*args, **options)


def at_most(x: Tensor, registers: int) -> int | None:
    """A bound from the launch table for tensors like x: the bounds are for 16 bits, none in fp32."""
    return registers if x.element_size() == 2 else None


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, H] with unit stride inside a row: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def row_block(width: int, tile: int) -> tuple[int, int, int]:
    """(columns of a block, rows of a block, warps): narrow rows share a block of `tile` elements."""
    block = max(triton.next_power_of_2(width), 16)
    rows = max(1, tile // block)
    return block, rows, warps_for(block * rows)


def warps_for(elements: int) -> int:
    """Warps for a block of that many elements, from the table."""
    return next((warps for limit, warps in ROW_WARPS.items() if elements <= limit), 32)
