"""What the caching allocator, the CUDA context and the communicator add to the live bytes."""

from __future__ import annotations

from .memory_constants import CONSTANTS as C
from .memory_request import MemoryRequest


def reserved(r: MemoryRequest, allocated: int) -> int:
    return int(allocated * 1.10)


def process(r: MemoryRequest, allocated: int) -> int:
    return int(allocated * C["irreducible_fragmentation"]) + C["cuda_context_bytes"]
