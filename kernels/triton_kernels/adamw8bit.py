"""Triton kernel of one AdamW step with 8-bit blockwise states, in place (mathematics and bytes: `adamw8bit`).

One row of a block is one absmax block, so its maximum is a reduction inside a warp. The nearest code is found by binary
search over the midpoints of the 256 levels, eight look-ups that stay in L1.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import start


@triton.jit
def _nearest(x, midpoints_ptr):
    """Index of the level nearest to x in [-1, 1]: how many of the 255 midpoints lie below it."""
    index = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(7, -1, -1):
        probe = index + (1 << bit)
        index = tl.where(x > tl.load(midpoints_ptr + probe - 1), probe, index)
    return index


@triton.jit
def _step(
    param_ptr, grad_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr, qmap1_ptr, qmap2_ptr, mid1_ptr, mid2_ptr,
    numel, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, root2, grad_scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = block * SIZE + tl.arange(0, SIZE)[None, :]
    mask, block_mask = at < numel, block * SIZE < numel
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * grad_scale
    code1 = tl.load(state1_ptr + at, mask=mask, other=0).to(tl.int32)
    code2 = tl.load(state2_ptr + at, mask=mask, other=0).to(tl.int32)
    m = tl.load(qmap1_ptr + code1) * tl.load(absmax1_ptr + block, mask=block_mask, other=0.0)
    v = tl.load(qmap2_ptr + code2) * tl.load(absmax2_ptr + block, mask=block_mask, other=0.0)
    # Lanes past the end must not raise the maximum of the last block.
    m = tl.where(mask, m * beta1 + g * one_minus_beta1, 0.0)
    v = tl.where(mask, v * beta2 + g * g * one_minus_beta2, 0.0)
    p = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32) * decay
    p -= step_size * (m / (tl.sqrt(v) / root2 + eps))
    tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=mask)
    max1, max2 = tl.max(tl.abs(m), axis=1)[:, None], tl.max(v, axis=1)[:, None]
    tl.store(absmax1_ptr + block, max1, mask=block_mask)
    tl.store(absmax2_ptr + block, max2, mask=block_mask)
    m = m * tl.where(max1 > 0.0, 1.0 / max1, 0.0)
    v = v * tl.where(max2 > 0.0, 1.0 / max2, 0.0)
    tl.store(state1_ptr + at, _nearest(m, mid1_ptr).to(tl.uint8), mask=mask)
    tl.store(state2_ptr + at, _nearest(v, mid2_ptr).to(tl.uint8), mask=mask)


def step(
    param: Tensor, grad: Tensor, state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor, qmap1: Tensor,
    qmap2: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    grad_scale: float, blocksize: int,
) -> None:  # fmt: skip
    """The step in place on param, both states and both absmaxes."""
    settings = TABLE["adamw8bit"]
    mid1, mid2 = (((q[1:] + q[:-1]) * 0.5).contiguous() for q in (qmap1, qmap2))
    start(
        _step, triton.cdiv(param.numel(), blocksize * settings["rows"]), param, grad.contiguous(), state1, state2,
        absmax1, absmax2, qmap1, qmap2, mid1, mid2, param.numel(), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps,
        1.0 - lr * weight_decay, lr / (1.0 - beta1**step), math.sqrt(1.0 - beta2**step), grad_scale,
        SIZE=blocksize, ROWS=settings["rows"], warps=settings["warps"],
    )  # fmt: skip
