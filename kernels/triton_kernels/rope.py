"""Triton kernel of rotary embedding for q and k together (mathematics and bytes: `rope`).

One program per token: the angles are read once and used for every head. Heads are taken in groups whose halves fill
the registers of the block; the number of warps is chosen so that even the group of k, the smaller one, loads 128 bits
a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import load_fp32, start, store_as


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, stride_x, stride_out, cos, sin, TIGHT: tl.constexpr, TIGHT_OUT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    EVEN: tl.constexpr = HEADS % GROUP == 0 and HALF == BLOCK
    for first in range(0, HEADS, GROUP):
        head = first + tl.arange(0, GROUP)[:, None]
        mask = (head < HEADS) & (col < HALF)
        # Heads side by side (the usual [B, T, heads, D] in memory): offsets become constants of the code.
        row_in = head * D if TIGHT else head.to(tl.int64) * stride_x
        row_out = head * D if TIGHT_OUT else head.to(tl.int64) * stride_out
        source, target = x_ptr + row_in + col, out_ptr + row_out + col
        a, b = load_fp32(source, mask, EVEN), load_fp32(source + HALF, mask, EVEN)
        store_as(target, a * cos - b * sin, mask, EVEN)
        store_as(target + HALF, b * cos + a * sin, mask, EVEN)
        if D > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, REST)[None, :]
            mask = (head < HEADS) & (rest < D)
            tl.store(out_ptr + row_out + rest, tl.load(x_ptr + row_in + rest, mask=mask), mask=mask)


@triton.jit
def _rope(
    q_ptr, k_ptr,  # [B, HQ, T, D] and [B, HK, T, D]
    qo_ptr, ko_ptr,  # the results, with strides of their own
    cos_ptr, sin_ptr,  # [B or 1, T, R], or a table [P, R]
    pos_ptr,  # [B, T] int, read only if TABLE_LOOKUP
    tokens_per_row,
    q_b, q_h, q_t, k_b, k_h, k_t, qo_b, qo_h, qo_t, ko_b, ko_h, ko_t, cos_b, cos_t,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_Q: tl.constexpr, GROUP_K: tl.constexpr, REST: tl.constexpr,
    TIGHT_Q: tl.constexpr, TIGHT_K: tl.constexpr, TIGHT_QO: tl.constexpr, TIGHT_KO: tl.constexpr,
    TABLE_LOOKUP: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    b, t = (token // tokens_per_row).to(tl.int64), (token % tokens_per_row).to(tl.int64)
    angle = tl.load(pos_ptr + token).to(tl.int64) * cos_t if TABLE_LOOKUP else b * cos_b + t * cos_t
    col = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + angle + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    if CONJUGATE:
        sin = -sin
    q, qo = q_ptr + b * q_b + t * q_t, qo_ptr + b * qo_b + t * qo_t
    k, ko = k_ptr + b * k_b + t * k_t, ko_ptr + b * ko_b + t * ko_t
    _rotate_heads(q, qo, q_h, qo_h, cos, sin, TIGHT_Q, TIGHT_QO, HQ, GROUP_Q, HALF, BLOCK, D, REST)
    _rotate_heads(k, ko, k_h, ko_h, cos, sin, TIGHT_K, TIGHT_KO, HK, GROUP_K, HALF, BLOCK, D, REST)


def launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, new tensors with the strides of their inputs where those are dense."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, q_heads, tokens, width = q.shape
    half = cos.shape[-1] // 2
    block = triton.next_power_of_2(half)
    # 256 elements a warp are 8 a thread: 128 bits in 16-bit types.
    warps = max(1, min(4, triton.next_power_of_2(k.shape[1]) * block // 256))
    group = max(1, TABLE["rope"]["elements_per_warp"] * warps // block)
    if positions is not None:
        cos_strides = (0, cos.stride(0))
        positions = positions.contiguous()
    else:
        cos_strides = (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    start(
        _rope, batch * tokens, q, k, q_out, k_out, cos, sin, positions if positions is not None else cos, tokens,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *cos_strides,
        HQ=q_heads, HK=k.shape[1], D=width, HALF=half, BLOCK=block,
        GROUP_Q=min(group, triton.next_power_of_2(q_heads)), GROUP_K=min(group, triton.next_power_of_2(k.shape[1])),
        REST=triton.next_power_of_2(max(width - 2 * half, 1)),
        TIGHT_Q=q.stride(1) == width, TIGHT_K=k.stride(1) == width,
        TIGHT_QO=q_out.stride(1) == width, TIGHT_KO=k_out.stride(1) == width, TABLE_LOOKUP=positions is not None,
        CONJUGATE=conjugate, warps=warps,
    )  # fmt: skip
    return q_out, k_out
