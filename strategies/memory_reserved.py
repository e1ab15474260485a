"""From live bytes to what the device must hold: the caching allocator, the CUDA context, the communicator.

Two numbers, because the allocator behaves in two ways (PyTorch, "Understanding CUDA Memory Usage"):

    reserved    with room to spare it keeps every segment it ever took. What differs in shape from phase to phase is
                held side by side: resident + largest forward/backward footprint + what the optimizer step adds, where
                a footprint is its live bytes plus the share that misses its old place on the next step
    process     under pressure it empties its cache and tries again, so a run passes as long as the live bytes and the
                holes between them fit: the number to compare with the card

The shares are fitted (`memory_constants.json` names the rows) and are the least certain numbers of the whole estimate.
"""

from __future__ import annotations

from .memory_activations import Activations
from .memory_constants import CONSTANTS as C
from .memory_request import SHARDED, MemoryRequest
from .memory_states import States


def reserved(r: MemoryRequest, s: States, a: Activations, allocated: int) -> int:
    """Bytes the caching allocator holds at its peak on a card with room (`torch.cuda.max_memory_reserved`)."""
    distributed = r.parallel != "none"
    kept_states = s.weights + s.adapters + s.optimizer + s.buffers
    head = s.head_gradient + s.block_gradient
    blocks = a.kept + a.retained + a.working + a.held_logits + head
    loss_share, block_share = _shares(r)
    footprint = max(a.kept + a.loss * (1 + loss_share), blocks * (1 + block_share))
    step = s.gradients + s.step_temporary
    total = kept_states + s.root + s.block + footprint + step
    total += C["reserved_distributed_bytes"] if distributed else 0
    pools = C["reserved_fsdp1_roots"] * s.root + C["reserved_fsdp1_blocks"] * s.block
    least = kept_states + s.gradients + (pools if r.parallel == "fsdp1" else 0)
    return int(max(total, least, allocated))


def hole_share(r: MemoryRequest) -> float:
    """The share of what comes and goes, activations and logits, that stays as holes when the cache is emptied."""
    return float(C["irreducible_share_sharded" if r.parallel in SHARDED else "irreducible_share"])


def fixed(r: MemoryRequest) -> int:
    """Bytes of the process beside its tensors: CUDA context and communicator."""
    return int(C["cuda_context_bytes"] + (C["communicator_bytes"] if r.gpus > 1 else 0))


def _shares(r: MemoryRequest) -> tuple[float, float]:
    """(share of the loss buffers, share of the blocks' bytes) that is held a second time."""
    if not r.adapters:
        return C["reserved_loss_share_full"], C["reserved_block_share_full"]
    block = C["reserved_block_share_fsdp" if r.parallel in SHARDED else "reserved_block_share"]
    if r.attention == "eager":
        block = C["reserved_block_share_eager"]
    return C["reserved_loss_share_ce" if r.kernels == "ce" else "reserved_loss_share_eager"], block
