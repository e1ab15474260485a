"""What a kernel does to memory, seen in Triton's interpreter: bytes, overlapping programs, addresses. For tests and
reports.

    with trace() as launches:                       # TRITON_INTERPRET=1, CPU tensors
        functional.rms_norm(x, w, 1e-6)
    launches[0].read_bytes, launches[0].races

Bytes are counted over active lanes. *Issued* bytes are what the programs ask for; *unique* ones are distinct
addresses, which is the traffic to memory under a perfect cache. The interpreter runs one program after the other and
so hides races: `races` counts the addresses that two programs write, or that one reads and another writes, and
`order` runs the programs in another order. Leaves out time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Accesses:
    """Start addresses of the elements that one program read or wrote, and the size of an element, per instruction."""

    addresses: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        self.addresses.append(
            np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask].ravel()
        )
        self.sizes.append(size)


@dataclass
class LaunchTrace:
    """One launch: per program what was read and what was written."""

    kernel: str
    reads: list[Accesses] = field(default_factory=list)
    writes: list[Accesses] = field(default_factory=list)

    @property
    def issued_read_bytes(self) -> int:
        return _issued(self.reads)

    @property
    def issued_written_bytes(self) -> int:
        return _issued(self.writes)

    @property
    def read_bytes(self) -> int:
        """Distinct bytes read."""
        return _unique(self.reads)

    @property
    def written_bytes(self) -> int:
        """Distinct bytes written."""
        return _unique(self.writes)

    @property
    def races(self) -> int:
        """Addresses that more than one program writes, plus those that one program reads and another writes."""
        writes = [_addresses(w) for w in self.writes]
        owner = np.concatenate([np.full(len(a), i) for i, a in enumerate(writes)] or [np.empty(0)])
        address = np.concatenate(writes or [np.empty(0, np.uint64)])
        order = np.argsort(address, kind="stable")
        address, owner = address[order], owner[order]
        conflicts = int(np.sum(address[1:] == address[:-1]))
        for program, read in enumerate(self.reads):
            found = np.isin(address, _addresses(read))
            conflicts += int(np.sum(owner[found] != program))
        return conflicts


def _addresses(accesses: Accesses) -> np.ndarray:
    return np.unique(np.concatenate(accesses.addresses or [np.empty(0, np.uint64)]))


def _issued(programs: Sequence[Accesses]) -> int:
    return sum(len(a) * size for p in programs for a, size in zip(p.addresses, p.sizes, strict=True))


def _unique(programs: Sequence[Accesses]) -> int:
    by_size: dict[int, list[np.ndarray]] = {}
    for program in programs:
        for addresses, size in zip(program.addresses, program.sizes, strict=True):
            by_size.setdefault(size, []).append(addresses)
    return sum(len(np.unique(np.concatenate(parts))) * size for size, parts in by_size.items())


@contextlib.contextmanager
def trace(
    *,
    order: Callable[[int], Sequence[int]] | None = None,
    only: tuple[int, int] | None = None,
    touch: bool = True,
) -> Iterator[list[LaunchTrace]]:
    """Record every launch made inside the block.

    order(n): a permutation of the n programs of a launch to run them in. only=(index, n): pretend that the one
    program started is number `index` of n. touch=False: compute addresses, but read zeros and write nothing, so that
    tensors may be larger than memory. Raises RuntimeError outside the interpreter.
    """
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from .triton_kernels import rms_norm

    if isinstance(rms_norm._forward, JITFunction):
        raise RuntimeError("kernels.trace needs TRITON_INTERPRET=1 in the environment before triton is first imported")
    launches: list[LaunchTrace] = []
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    masked_load, masked_store, set_index, set_dim, call = (
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx, builder.set_grid_dim,
        executor.__call__,
    )  # fmt: skip

    def traced_load(ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        launches[-1].reads[-1].add(ptrs.data, mask.data, _size(interpreter, ptrs))
        if touch:
            return masked_load(ptrs, mask, other, *rest)
        element = ptrs.get_element_ty()
        zeros = np.zeros_like(ptrs.data, dtype=interpreter._get_np_dtype(element))
        return interpreter.TensorHandle(zeros, element)

    def traced_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].writes[-1].add(ptrs.data, mask.data, _size(interpreter, ptrs))
        return masked_store(ptrs, value, mask, *rest) if touch else None

    permutation: list[int] = []

    def traced_dim(nx: int, ny: int, nz: int) -> None:
        permutation[:] = order(nx) if order is not None else range(nx)
        set_dim(*((only[1], 1, 1) if only else (nx, ny, nz)))

    def traced_index(x: int, y: int, z: int) -> None:
        launches[-1].reads.append(Accesses())
        launches[-1].writes.append(Accesses())
        set_index(only[0] if only else permutation[x], y, z)

    def traced_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(LaunchTrace(kernel=f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"))
        return call(self, *args, **kwargs)

    changed = {
        "create_masked_load": traced_load, "create_masked_store": traced_store, "set_grid_idx": traced_index,
        "set_grid_dim": traced_dim,
    }  # fmt: skip
    for name, function in changed.items():
        setattr(builder, name, function)
    executor.__call__ = traced_call
    try:
        yield launches
    finally:
        executor.__call__ = call
        for name in changed:
            delattr(builder, name)


def _size(interpreter: Any, ptrs: Any) -> int:
    return np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
