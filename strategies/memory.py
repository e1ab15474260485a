"""Peak memory of a fine-tuning run by arithmetic: per GPU for each phase, and per node on the host. Torch-free.

The peak is the maximum over moments, not a sum over everything. For one GPU, in bytes:

    load               weights + adapters + one matrix in 16 bit while it is quantized
    loss               W + boundaries + logits by loss path                        (+ G if gradients accumulate)
    last block         W + boundaries + working set + held logits + gradients of head and of one matrix
    first block        W + one boundary + working set + G                          (+ L - 1 boundaries, see FSDP1)
    step               W + G + temporary of the optimizer
    save               W + what is gathered to write it

    W            weights + adapters + optimizer state + fixed buffers + gathered copies (see `memory_states.py`)
    G            gradients of everything that trains; set to none after each step, so absent at the loss
    boundaries   full checkpointing keeps one hidden state a block: L T h e (Chen et al. 2016, arXiv 1604.06174);
                 without it every block keeps all that its backward reads
    working set  what one block holds at the worst moment of its backward (see `memory_activations.py`)

Bytes of a parameter (P of them, cut over N ranks): 16-bit full fine-tuning 2 + 2 + 4, and 2 more in a foreach step;
mixed precision under FSDP 4 + 4 + 8 (+ 4), over N; ZeRO-3 2 + 2 + 12, over N (Rajbhandari et al. 2020, arXiv
1910.02054); NF4 0.5 + absmax (arXiv 2305.14314). FSDP gathers the root unit for the whole pass and blocks as they
compute (Zhao et al. 2023, arXiv 2304.11277). FSDP1 under a frozen base holds L - 2 more hidden states through
backward (measured, fms-acceleration); FSDP2 does not (measured on two CPU ranks with torch 2.13).

Data loading, generation during evaluation and memory outside PyTorch's allocator other than context and communicator
are left out. `docs/accuracy.md` has the estimate beside 123 published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .memory_activations import Activations, activations
from .memory_constants import CONSTANTS as C
from .memory_request import MemoryRequest, ModelDims
from .memory_reserved import fixed, hole_share, reserved
from .memory_states import States, residual_width, states, trainable_width

__all__ = ["MemoryEstimate", "MemoryRequest", "ModelDims", "estimate", "needs"]

GIB = 2**30
# Bytes of one moment of a pass beside the resident ones, by component.
Moment = tuple[int, int, int, int]
PHASES = ("load", "forward_backward", "optimizer_step", "checkpoint_save")
PARTS = ("gradients", "gathered", "activations", "logits")
NOTHING: Moment = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one GPU; `host_bytes` of one node.

    `peak_allocated_bytes` live tensors (`max_memory_allocated`), the maximum of `phases` (load, forward_backward,
    optimizer_step, checkpoint_save). `peak_reserved_bytes` what the caching allocator holds on a card with room.
    `process_bytes` the least the process needs, to compare with the card. `components` the parts of `process_bytes`
    at the peak, adding up to it.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    process_bytes: int
    host_bytes: int
    phases: dict[str, int]
    components: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The object that `estimate --json` prints, in GiB of 2^30 bytes."""

        def gib(value: int) -> float:
            return round(value / GIB, 4)

        return {
            "peak_allocated_gib": gib(self.peak_allocated_bytes),
            "peak_reserved_gib": gib(self.peak_reserved_bytes),
            "process_gib": gib(self.process_bytes),
            "host_gib": gib(self.host_bytes),
            "phases": {name: gib(value) for name, value in self.phases.items()},
            "components": {name: gib(value) for name, value in self.components.items()},
        }


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """Peak memory of one GPU and of one node for `request`. Pure; some tens of microseconds (benchmarks/planner.py)."""
    s, a, phases, worst, needed = _weigh(request)
    peak = max(phases)
    at_peak = {"weights": s.weights, "adapters": s.adapters, "optimizer": s.optimizer, "buffers": s.buffers}
    if peak == phases[0]:
        at_peak |= {"optimizer": 0, "buffers": s.buffers + s.staging}
    elif peak == phases[1]:
        at_peak |= zip(PARTS, worst, strict=True)
    elif peak == phases[2]:
        at_peak |= {"gradients": s.gradients, "step_temporary": s.step_temporary}
    else:
        at_peak["gathered"] = s.block
    components = {name: value for name, value in at_peak.items() if value}
    return MemoryEstimate(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved(request, s, a, peak),
        process_bytes=needed,
        host_bytes=_host(request, s),
        phases=dict(zip(PHASES, phases, strict=True)),
        components={**components, "holes_and_context": needed - peak},
    )


def needs(request: MemoryRequest) -> tuple[int, int, int]:
    """(peak_allocated_bytes, process_bytes, host_bytes) of `estimate`, for who weighs thousands and shows a few."""
    s, _, phases, _, needed = _weigh(request)
    return max(phases), needed, _host(request, s)


def _weigh(r: MemoryRequest) -> tuple[States, Activations, tuple[int, int, int, int], Moment, int]:
    """What is there, the live bytes of each of PHASES, the worst moment of forward and backward, the bytes of the process."""
    s, a = states(r), activations(r)
    resident = s.weights + s.adapters + s.optimizer + s.buffers
    share = hole_share(r)
    loading, stepping = s.weights + s.adapters + s.buffers + s.staging, resident + s.gradients + s.step_temporary
    saving = resident + s.block
    passing, worst, needed = 0, NOTHING, float(max(loading, stepping, saving))
    for moment in _passes(r, s, a):
        gradients, gathered, active, logits = moment
        live = resident + gradients + gathered + active + logits
        if live > passing:
            passing, worst = live, moment
        holes = live + share * (active + logits)
        if holes > needed:
            needed = holes
    return s, a, (loading, passing, stepping, saving), worst, int(needed) + fixed(r) + _pools(s)


def _passes(r: MemoryRequest, s: States, a: Activations) -> list[Moment]:
    """What is alive beside the resident bytes at each moment of forward and backward that can be the peak."""
    gathered = s.root + s.block
    one = s.one_block
    ahead = (
        r.shards > 1 or r.parallel != "fsdp2"
    )  # one GPU gathers nothing before it is needed, and keeps nothing that has been used
    zero = r.parallel in ("zero2", "zero3")
    alone = r.parallel in ("none", "ddp")
    buckets = r.parallel == "ddp" and r.gpus > 1 and r.kernels == "trebuchet"  # gradients live in them for good
    early = s.gradients if r.grad_accum > 1 or zero or buckets else 0  # DeepSpeed's partition is allocated once
    head = 0 if s.head else s.head_gradient
    at_last, held, kept = early + head, a.held_logits, a.kept
    around_last = gathered + (s.casts if r.checkpointing == "none" else 0)
    around_first = s.root + one + s.head * ahead  # FSDP2 gathers the embedding ahead, which is of the size of the head
    before_first = kept + a.retained if a.retained else a.kept_last
    unborn = s.block_gradients - s.block_gradient if alone and not early else 0
    whole = s.gradients + s.reduced_block
    # The block's backward at its worst, and at the end of its MLP's, with the gradients of the block's weights.
    moments = [
        (early, s.root + s.casts + (s.head + one * ahead if s.head else 0), kept, a.loss),
        (at_last + s.block_gradient, around_last, kept + a.working, held),
        (at_last + s.block_gradients, around_last, kept + a.ending, held),
        (whole - unborn, around_first, before_first + a.working, held),
        (whole + (s.block_gradients if s.reduced_block else 0), around_first, before_first + a.ending, held),
    ]
    if s.head:
        moments += _head_arrives(r, s, a, early, one * ahead)
    if s.reduced_root:
        moments += _reductions(r, s, a, early, one)
    elif alone and not r.adapters and (early or not r.model.head_params):
        # the embedding's gradient comes last, whole: added in place to one that is there, and to a tied head's beside both
        more = (0 if r.model.head_params else 2) + (1 if early else 0)
        moments.append((s.gradients + more * s.head_gradient, 0, 0, 0))
    return moments


def _head_arrives(r: MemoryRequest, s: States, a: Activations, early: int, one: int) -> list[Moment]:
    """Moments of FSDP2 with a head that is a unit of its own. The buffer of its all-gather and the weight copied out of it are both
    there when it arrives, beside the last block's buffer (torch 2.13, FSDPParamGroup.wait_for_unshard), the last hidden state and
    its norm; and between ranks they stay through its forward, in which this project's loss forms its gradient when the head is frozen."""
    hidden = 2 * r.model.hidden_size * residual_width(r) * r.tokens
    gathered = s.root + 2 * s.head
    moments = [(early, gathered + one, a.kept + hidden, 0)]
    if r.kernels == "trebuchet" and r.adapters:
        moments.append((early, gathered if r.shards > 1 else s.root + s.head, a.kept, a.loss))
    return moments


def _pools(s: States) -> int:
    """Bytes that FSDP2's communication streams hold beyond what they use at the peak: blocks of one stream are of no use to
    another, so the stream that gathers keeps room for its largest unit, and so does the one that reduces."""
    if not s.reduced_block:
        return 0
    return max(0, s.head - s.one_block) + max(0, s.reduced_root - s.reduced_block)


def _reductions(r: MemoryRequest, s: States, a: Activations, early: int, one: int) -> list[Moment]:
    """Moments of FSDP2 in which whole gradients stand beside the fp32 buffer that is reduced, which stays until the next one:
    behind the head, in the last block's backward and at its end, in the block before it, and behind the embedding."""
    before = a.kept - a.kept_last if r.model.num_layers > 1 else 0
    head = 0 if s.head else s.head_gradient  # of a head that is a unit of its own nothing is left when the blocks begin
    gathered = s.root + s.block
    moments = [
        (early + head + s.block_gradients + s.reduced_block, s.root + one, before, 0),
        (early + head + s.block_gradient + s.reduced_block, gathered, before + a.working if before else 0, 0),
        (s.gradients + s.head_gradient * (1 if s.head else 3), s.root, 0, 0),
        (s.gradients + s.head_gradient + s.reduced_root, 0, 0, 0),
    ]
    if s.head:
        behind = early + s.reduced_root
        moments += [
            (behind + s.head_gradient, one, a.kept, 0),
            (behind + s.block_gradient, gathered, a.kept + a.working, 0),
            (behind + s.block_gradients, gathered, a.kept + a.ending, 0),
        ]
    return moments


def _host(r: MemoryRequest, s: States) -> int:
    """Bytes of main memory a node needs: its ranks' processes, offloaded state, and the shard an asynchronous
    checkpoint copies. Pages of the weight files are not counted: the kernel drops them when it needs room."""
    shards = r.shards if r.parallel != "ddp" else 1
    saved = s.trainable * (trainable_width(r) + 8) // shards
    return r.local_ranks * (C["host_process_bytes"] + s.staging + s.host + saved)
