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
from .launch import start


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, stride_x, stride_out, cos, sin, HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    for first in tl.static_range(0, HEADS, GROUP):
        head = first + tl.arange(0, GROUP)[:, None]
        mask = (head < HEADS) & (col < HALF)
        source, target = x_ptr + head * stride_x + col, out_ptr + head * stride_out + col
        a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)
        if D > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, REST)[None, :]
            mask = (head < HEADS) & (rest < D)
            value = tl.load(x_ptr + head * stride_x + rest, mask=mask)
            tl.store(out_ptr + head * stride_out + rest, value, mask=mask)


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
    TABLE_LOOKUP: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens_per_row, token % tokens_per_row
    angle = tl.load(pos_ptr + token).to(tl.int64) * cos_t if TABLE_LOOKUP else b * cos_b + t * cos_t
    col = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + angle + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    if CONJUGATE:
        sin = -sin
    q, qo = q_ptr + b * q_b + t * q_t, qo_ptr + b * qo_b + t * qo_t
    k, ko = k_ptr + b * k_b + t * k_t, ko_ptr + b * ko_b + t * ko_t
    _rotate_heads(q, qo, q_h, qo_h, cos, sin, HQ, GROUP_Q, HALF, BLOCK, D, REST)
    _rotate_heads(k, ko, k_h, ko_h, cos, sin, HK, GROUP_K, HALF, BLOCK, D, REST)


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
        REST=triton.next_power_of_2(max(width - 2 * half, 1)), TABLE_LOOKUP=positions is not None, CONJUGATE=conjugate,
        warps=warps,
    )  # fmt: skip
    return q_out, k_out
