"""Triton kernel that dequantizes NF4, double quantization included, in one launch (layout and bytes: `nf4`).

Both nibbles of a byte are looked up at once in a table of 256 pairs of fp32 (2 KB, built once per code), and a thread
takes 16 bytes in and writes 32 values, so loads and stores are 128 bits wide. Products and sums are kept apart
(enable_fp_fusion=False), because bitsandbytes rounds between them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..launch_table import TABLE
from .launch import start

_pairs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@triton.jit
def _dequantize(
    packed_ptr,  # [bytes] uint8
    absmax_ptr,  # [blocks] fp32, or uint8 if NESTED
    pairs_ptr,  # [256] int64: the bits of (code[low nibble], code[high nibble])
    code2_ptr,  # [256] fp32
    absmax2_ptr,  # [ceil(blocks / BLOCK2)] fp32
    offset_ptr,  # [1] fp32
    out_ptr,  # [numel]
    numel,
    packed_bytes,
    blocks,
    NESTED: tl.constexpr,
    BLOCK2: tl.constexpr,
    HALF: tl.constexpr,  # bytes of one block of absmax
    ROWS: tl.constexpr,  # blocks of absmax per program
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=block < blocks, other=0)
        scale = tl.load(code2_ptr + q.to(tl.int32))
        scale = scale * tl.load(absmax2_ptr + block // BLOCK2, mask=block < blocks, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=block < blocks, other=0.0)
    byte = block * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_bytes, other=0)
    pair = tl.load(pairs_ptr + packed.to(tl.int32))
    high = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale
    low = pair.to(tl.int32).to(tl.float32, bitcast=True) * scale
    values = tl.interleave(high, low)
    at = block * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=at < numel)


def _pair_table(code: Tensor) -> Tensor:
    """[256] int64 whose halves are the fp32 bits of both nibbles of a byte; kept as long as `code` lives unchanged."""
    found = _pairs.get(code)
    if found is None or found[0] != code._version:
        bits = code.float().view(torch.int32).long()
        table = (bits.repeat_interleave(16) << 32) | (bits.repeat(16) & 0xFFFFFFFF)
        found = _pairs[code] = (code._version, table)
    return found[1]


def dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
    shape: Sequence[int], dtype: torch.dtype, blocksize: int, blocksize2: int,
) -> Tensor:  # fmt: skip
    """The weight [shape] in `dtype`."""
    out = packed.new_empty(shape, dtype=dtype)
    half, settings = blocksize // 2, TABLE["nf4_dequantize"]
    rows = max(1, settings["block"] // half)
    nested = absmax2 is not None
    start(
        _dequantize, triton.cdiv(out.numel(), rows * blocksize), packed.contiguous(), absmax.contiguous(),
        _pair_table(code), *((code2, absmax2, offset) if nested else (code, code, code)), out, out.numel(), packed.numel(),
        len(absmax),
        NESTED=nested, BLOCK2=blocksize2, HALF=half, ROWS=rows, warps=settings["warps"], enable_fp_fusion=False,
    )  # fmt: skip
    return out
