"""Triton kernel of rotary embedding for q and k together (mathematics and bytes: `rope`).

One program turns `BLOCK` pairs of channels of one token in all its heads, so the angles are read once; a token takes one
program or several. Heads are taken in groups that give each thread 128 bits in 16-bit types. The angles of a block are
fewer than the threads: each thread then loads its own, and nothing goes through shared memory.

Where x and the angles have one 16-bit type, products and sums are formed in it, two in an instruction, as eager torch does;
with one rounding less than eager, because the second product and the sum are one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..launch_table import TABLE
from .launch import start, store_as


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, stride_x, stride_out, cos, sin, TIGHT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, FIRST, HALF: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    REST: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    col = FIRST + tl.arange(0, BLOCK)[None, :]
    EVEN: tl.constexpr = HEADS % GROUP == 0 and HALF % BLOCK == 0
    for first in tl.static_range(0, HEADS, GROUP):
        head = first + tl.arange(0, GROUP)[:, None]
        mask = (head < HEADS) & (col < HALF)
        # Heads side by side (the usual [B, T, heads, D] in memory): offsets become constants of the code.
        row_in = head * D if TIGHT else head.to(tl.int64) * stride_x
        row_out = head * D if TIGHT else head.to(tl.int64) * stride_out
        source, target = x_ptr + row_in + col, out_ptr + row_out + col
        a, b = _load(source, mask, cos.dtype, EVEN), _load(source + HALF, mask, cos.dtype, EVEN)
        store_as(target, a * cos + b * sin if CONJUGATE else a * cos - b * sin, mask, EVEN)
        store_as(target + HALF, b * cos - a * sin if CONJUGATE else b * cos + a * sin, mask, EVEN)
        if D > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, REST)[None, :]
            mask = (head < HEADS) & (rest < tl.where(FIRST == 0, D, 0))  # by the token's first program
            tl.store(out_ptr + row_out + rest, tl.load(x_ptr + row_in + rest, mask=mask), mask=mask)


@triton.jit
def _load(ptr, mask, dtype: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        value = tl.load(ptr)
    else:
        value = tl.load(ptr, mask=mask, other=0.0)
    return value.to(dtype)


@triton.jit
def _offset(b, stride_b, t, stride_t, FLAT: tl.constexpr):
    """b stride_b + t stride_t in 64 bits (FLAT: b is 0); strides are not negative, so that unsigned products of 32 bits do."""
    zero = tl.zeros([], dtype=tl.uint32)
    offset = t.to(tl.uint64) * (zero + stride_t).to(tl.uint64)
    if not FLAT:
        offset += b.to(tl.uint64) * (zero + stride_b).to(tl.uint64)
    return offset.to(tl.int64)


@triton.jit
def _angles(ptr, FIRST, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    col = FIRST + tl.arange(0, BLOCK)
    angles = tl.load(ptr + col, mask=col < HALF)
    if WIDE:
        angles = angles.to(tl.float32)
    return angles[None, :]


@triton.jit
def _rope(
    q_ptr, k_ptr,  # [B, HQ, T, D] and [B, HK, T, D]
    qo_ptr, ko_ptr,  # the results, with strides of their own
    cos_ptr, sin_ptr,  # [B or 1, T, R], or a table [P, R]
    pos_ptr,  # [B, T] int, read only if TABLE_LOOKUP
    tokens_per_row,
    q_b, q_h, q_t, k_b, k_h, k_t, qo_b, qo_h, qo_t, ko_b, ko_h, ko_t, cos_b, cos_t,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, REST: tl.constexpr, TIGHT: tl.constexpr,
    TABLE_LOOKUP: tl.constexpr, CONJUGATE: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (HALF + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.uint32)  # unsigned division by CHUNKS is a shift
    token, first = program // CHUNKS, program % CHUNKS * BLOCK
    if FLAT:
        b, t = 0, token
    else:
        per_row = tl.cast(tokens_per_row, tl.uint32)
        b, t = token // per_row, token % per_row
    if TABLE_LOOKUP:
        angle = tl.load(pos_ptr + token).to(tl.int64) * cos_t
    else:
        angle = _offset(b, cos_b, t, cos_t, FLAT)
    at_q, at_k = _offset(b, q_b, t, q_t, FLAT), _offset(b, k_b, t, k_t, FLAT)
    q, k = q_ptr + at_q, k_ptr + at_k
    qo = qo_ptr + (at_q if SAME else _offset(b, qo_b, t, qo_t, FLAT))
    ko = ko_ptr + (at_k if SAME else _offset(b, ko_b, t, ko_t, FLAT))
    cos, sin = _angles(cos_ptr + angle, first, HALF, BLOCK, WIDE), _angles(sin_ptr + angle, first, HALF, BLOCK, WIDE)
    _rotate_heads(q, qo, q_h, qo_h, cos, sin, TIGHT, HQ, GROUP, first, HALF, BLOCK, D, REST, CONJUGATE)
    _rotate_heads(k, ko, k_h, ko_h, cos, sin, TIGHT, HK, GROUP, first, HALF, BLOCK, D, REST, CONJUGATE)


def launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, new tensors with the strides of their inputs where those are dense."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    half, cos, sin = cos.shape[-1] // 2, cos.contiguous(), sin.contiguous()
    batch, q_heads, tokens, width = q.shape
    table = TABLE["rope"]
    block = min(table["block"], triton.next_power_of_2(half))
    group = max(1, table["elements"] // block)
    if positions is not None:
        cos_strides = (0, cos.stride(0))
        positions = positions.contiguous()
    else:
        cos_strides = (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    heads = ((q, q_out), (k, k_out))
    start(
        _rope, batch * tokens * triton.cdiv(half, block), q, k, q_out, k_out, cos, sin,
        positions if positions is not None else cos, tokens,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *cos_strides,
        HQ=q_heads, HK=k.shape[1], D=width, HALF=half, BLOCK=block, GROUP=group,
        REST=triton.next_power_of_2(max(width - 2 * half, 1)),
        TIGHT=all(x.stride(1) == width for pair in heads for x in pair),
        SAME=all(x.stride() == out.stride() for x, out in heads),
        FLAT=batch == 1
        or (
            (positions is not None or len(cos) == batch)
            and all(x.stride(0) == tokens * x.stride(2) for pair in heads for x in pair)
        ),
        TABLE_LOOKUP=positions is not None, CONJUGATE=conjugate, WIDE=_wide(q, k, cos), warps=table["warps"],
    )  # fmt: skip
    return q_out, k_out


def _wide(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Whether to compute in fp32: mixed dtypes, as torch promotes them; and bf16 in the interpreter, which cannot."""
    one_type = q.dtype == k.dtype == cos.dtype
    return not one_type or (q.dtype == torch.bfloat16 and interpreting())
