"""Which implementation of an op runs: chosen once per call, forceable, counted. Leaves out the implementations.

Every op of this layer exists twice with one contract: a Triton kernel ("triton") and plain torch ("torch"). The
choice is a function of device and dtype alone, is made once per call by `choose`, travels as a string argument of the
registered op (so that the backward pass uses what the forward used, whatever thread runs it), and is counted where
the work happens.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]
TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

_forced: Backend | None = None
_calls: dict[str, dict[str, int]] = {}
_lock = threading.Lock()


class KernelUnavailable(RuntimeError):
    """A backend was forced that cannot run here; the message names the op, the limit and what to change."""


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 at first import of
    triton)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@contextlib.contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Use `backend` for every op called inside the block, in all threads; the backward of these calls uses it too.

    Raises KernelUnavailable at entry when Triton is missing or has neither a GPU nor its interpreter, and at a call
    when the op cannot run there with the tensors it was given. Blocks nest; the previous choice returns at exit.
    """
    global _forced
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend is {backend!r}; it must be 'torch' or 'triton'")
    if backend == "triton":
        _require_triton()
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def choose(op: str, *tensors: Tensor | None) -> Backend:
    """Backend of one call: "triton" for fp16, bf16 and fp32 on CUDA or ROCm, "torch" elsewhere.

    Raises KernelUnavailable when "triton" is forced and cannot work.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    reason = None
    for t in given:
        if t.is_floating_point() and t.dtype not in TRITON_DTYPES:
            reason = f"{t.dtype} is not one of float16, bfloat16, float32"
    if _forced == "torch":
        return "torch"
    if _forced == "triton":
        if reason is None and device != "cuda" and not interpreting():
            reason = f"its tensors are on {device}, and TRITON_INTERPRET=1 is not set"
        if reason is not None:
            raise KernelUnavailable(
                f"{op}: the Triton backend is forced but cannot run: {reason}. "
                "Leave the force_backend block or change the input."
            )
        return "triton"
    return "triton" if device == "cuda" and reason is None else "torch"


def count(op: str, backend: str) -> None:
    """Note that `op` ran once on `backend`; called by the implementations, so that it counts what ran."""
    with _lock:
        per_op = _calls.setdefault(op, {})
        per_op[backend] = per_op.get(backend, 0) + 1


def calls() -> dict[str, dict[str, int]]:
    """{op: {backend: how often it ran in this process}}, backward passes as "<op>_backward"."""
    with _lock:
        return {op: dict(per_op) for op, per_op in sorted(_calls.items())}


def reset_calls() -> None:
    """Start counting again from zero."""
    with _lock:
        _calls.clear()


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelUnavailable(f"the Triton backend is forced, but triton cannot be imported ({error}).") from None
    if not torch.cuda.is_available() and not interpreting():
        raise KernelUnavailable(
            "the Triton backend is forced, but there is no CUDA or ROCm device and TRITON_INTERPRET=1 is not set "
            "(it must be set before triton is first imported)."
        )
