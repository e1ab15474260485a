"""Bytes a token of a block whose experts are three-dimensional tensors, as transformers 5 keeps them (`ModelDims.fused_experts`).

Rows of all experts are sorted and multiplied in one grouped product, so that nothing is one expert's share: with k experts a token
everything of the MLP is there k times, kept and in backward. That code runs as it is, without this project's kernels. Counted from
`grouped_mm_experts_forward` (transformers 5.23) and compared with the probe (`tests/launcher/test_probing.py`). Symbols as in
`memory_activations.py`. Left out: experts that run one after another, which that module counts.
"""

from __future__ import annotations

from .memory_request import MemoryRequest
from .memory_states import hidden_width, residual_width


def grouped(r: MemoryRequest, attention: float) -> tuple[float, float, float, float]:
    """Bytes a token: kept for backward; alive at the worst moment of the MLP's backward, of attention's, and at the end of the MLP's.

    `attention` what attention and the norms keep.
    """
    m, trained = r.model, not r.adapters
    e = residual_width(r)  # autocast leaves grouped products alone: with fp32 weights they are fp32
    h, f, k = m.hidden_size, m.intermediate_size, m.active_experts
    router = 4 * m.experts + 40 * k  # probabilities in fp32; indices of 8 bytes, there and back
    product = (
        k * f * e if trained else 0
    )  # the input of down, and below that of gate and up, for the gradients of the experts
    outputs = k * h * e  # for the gradient of the routing weights
    kept = attention + 3 * k * f * e + product + outputs + (k * h * e if trained else 0) + router
    # Routing weights are fp32, so weighted outputs are: their gradient, and those of both of their factors.
    at_weights = kept + 3 * k * h * 4 + 4 * h
    at_product = kept - product - outputs + 3 * k * f * e  # gradients of the product and of silu(gate) and up
    at_end = attention + router + k * (2 * f + 2 * h) * e
    at_attention = attention + 2 * m.num_heads * m.head_dim * hidden_width(r)
    ends = h * residual_width(r)
    return kept, max(at_weights, at_product) + ends, at_attention + ends, at_end + ends
