"""Bytes around the loss, by loss path: logits whole, or a chunk at a time.

Per logit of whole logits (constants with their derivation in `memory_constants.json`): 14 with an eager 16-bit head, 16
with an fp32 one, 8 with a Triton cross-entropy that writes the gradient in place. Beside them two or three hidden
states: the final norm's output, its copy, its gradient. Left out: the boundary tensors, which `memory_activations.py`
counts and which are all alive at this moment.
"""

from __future__ import annotations

from .memory_constants import CONSTANTS as C
from .memory_request import MemoryRequest
from .memory_states import compute_width, hidden_width, other_width


def loss_bytes(r: MemoryRequest) -> tuple[int, int]:
    """(bytes at the loss, bytes of logits that stay during the blocks' backward)."""
    m, t, e = r.model, r.tokens, hidden_width(r)
    v, h = m.vocab_size, m.hidden_size
    head = other_width(r) if r.adapters else compute_width(r)
    if r.kernels == "none":
        per_logit = C["logit_bytes_eager_fp32_head"] if head == 4 else C["logit_bytes_eager"]
        # A plain loop keeps the model's outputs, logits included, through backward (the T4 rows); Trainer, which the
        # sharded rows used, lets go of them (FM-092, FM-035). On one GPU the dearer case is budgeted.
        held = head * v * t if r.parallel == "none" else 0
        return int(per_logit * v * t + 3 * h * e * t), held
    if r.kernels == "ce":
        return int(C["logit_bytes_ce"] * v * t + 2 * h * e * t), 0
    if r.kernels == "chunked-ce":
        kind = {"full": "_full", "qlora": "_4bit_head"}.get(r.method, "")
        per_logit = C["logit_bytes_chunked" + kind]
        return int(per_logit * v * t + 2 * h * e * t), 0
    return _chunked_loss(r), 0


def _chunked_loss(r: MemoryRequest) -> int:
    """Bytes at a loss whose logits are never whole: one chunk, the hidden states and their gradient, and, where the
    head trains, the buffers of its gradient.

    Liger chunks so that logits take about as much as hidden states and converts them; this project's kernels write
    the gradient over the 16-bit logits, and accumulate the head's in fp32 beside one chunk's product.
    """
    m, t = r.model, r.tokens
    v, h = m.vocab_size, m.hidden_size
    if r.kernels == "fused":
        chunk, per_logit, per_weight = _power_of_two(-(-t // -(-v // h))), 8, 2 * compute_width(r)
    else:
        chunk, per_logit, per_weight = C["head_chunk_frozen" if r.adapters else "head_chunk_trained"], 2, 6
    head_gradient = 0 if r.adapters else per_weight * v * h
    return min(chunk, t) * v * per_logit + 3 * h * hidden_width(r) * t + head_gradient


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
