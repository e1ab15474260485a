"""Bytes a token of a block whose experts are three-dimensional tensors, as transformers 5 keeps them (`ModelDims.fused_experts`).

Rows of all experts are sorted and multiplied in one grouped product, so that nothing is one expert's share: with k experts a token
everything of the MLP is there k times, kept and in backward. Adapters on experts (PEFT 0.21) are folded into a second copy of the
block's experts, which is kept for backward and gets a gradient of its own. That code runs as it is, without this project's
kernels. Counted from `grouped_mm_experts_forward` (transformers 5.23) and compared with the probe (`tests/launcher/test_probing.py`).
Symbols as in `memory_activations.py`. Left out: experts that run one after another, which that module counts.
"""

from __future__ import annotations

from .memory_request import MemoryRequest, once
from .memory_states import hidden_width, residual_width


def grouped(r: MemoryRequest, attention: float) -> tuple[float, float, float, float]:
    """Bytes a token: kept for backward; alive at the worst moment of the MLP's backward, of attention's, and at the end of the MLP's.

    `attention` what attention and the norms keep.
    """
    m = r.model
    e = residual_width(r)  # autocast leaves grouped products alone: with fp32 weights they are fp32
    h, f, k = m.hidden_size, m.intermediate_size, m.active_experts
    router = 4 * m.experts + 40 * k  # probabilities in fp32; indices of 8 bytes, there and back
    wide, narrow = _trained(r)
    # The inputs of down, and of gate and up, for the gradients of what multiplies them; outputs for that of the routing weights.
    product, rows, outputs = k * f * e * narrow, k * h * e * wide, k * h * e
    kept = attention + 3 * k * f * e + product + rows + outputs + router
    # Weighted outputs have the dtype of the routing weights: their gradient, and those of both of their factors.
    routed = e if m.routing_16bit else 4
    at_weights = kept + 3 * k * h * routed + h * routed
    at_product = kept - product - outputs + 3 * k * f * e  # gradients of the product and of silu(gate) and up
    at_end = attention + router + k * (2 * f + 2 * h) * e
    at_attention = attention + 2 * m.num_heads * m.head_dim * hidden_width(r)
    ends = h * residual_width(r)
    return kept, max(at_weights, at_product) + ends, at_attention + ends, at_end + ends


@once
def folded(r: MemoryRequest) -> tuple[int, int]:
    """Bytes of one block's experts that are there once more: kept for backward, with adapters folded in; and beside the gradients at
    its end. The gradient of trained ones comes transposed and is copied into the parameter's order."""
    m = r.model
    if not m.fused_experts or m.experts == 1:
        return 0, 0
    wide, narrow = _trained(r)
    one = m.experts * m.hidden_size * m.intermediate_size * residual_width(r)
    if not r.adapters:
        return 0, 2 * one
    gate_up, down = 2 * one * wide, one * narrow
    return gate_up + down, 2 * gate_up + down


def _trained(r: MemoryRequest) -> tuple[bool, bool]:
    """Whether gradients reach the experts' (gate and up, down), whole or through adapters."""
    targets = set(r.lora_targets or ()) if r.adapters else {"gate", "up", "down"}
    return bool(targets & {"gate", "up"}), "down" in targets
