"""Triton kernels of LayerNorm (mathematics and bytes: `norms`). The same two shapes as `rms_norm`, with the mean
removed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import as_rows, load_fp32, row_block, start, store_as
from .partials import split_rows, store_partial, sum_partials


@triton.jit
def _forward(
    x_ptr,  # [rows, H]
    w_ptr,  # [H]
    b_ptr,  # [H]
    y_ptr,  # [rows, H] contiguous
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    rows,
    stride_x,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < H)
    EVEN: tl.constexpr = H == BLOCK and ROWS == 1
    x = load_fp32(x_ptr + row * stride_x + col, mask, EVEN)
    mean = tl.sum(x, axis=1)[:, None] * (1.0 / H)
    # Masked lanes must not add mean^2 to the variance.
    centred = x - mean if H == BLOCK else tl.where(col < H, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * (1.0 / H) + eps)[:, None]
    w = load_fp32(w_ptr + col, col < H, H == BLOCK)
    b = load_fp32(b_ptr + col, col < H, H == BLOCK)
    store_as(y_ptr + row * H + col, centred * rstd * w + b, mask, EVEN)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward(
    dy_ptr,  # [rows, H]
    x_ptr,  # [rows, H]
    w_ptr,  # [H]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    dx_ptr,  # [rows, H] contiguous
    dw_ptr,  # [2, programs, H] fp32: partial dw, then partial db; written only if DW
    rows,
    rows_per_program,  # a multiple of ROWS
    stride_dy,
    stride_x,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    col = tl.arange(0, BLOCK)[None, :]
    EVEN: tl.constexpr = H == BLOCK and ROWS == 1
    w = load_fp32(w_ptr + col, col < H, H == BLOCK)
    if DW:
        dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for top in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        row = (top + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (col < H)
        dy = load_fp32(dy_ptr + row * stride_dy + col, mask, EVEN)
        x = load_fp32(x_ptr + row * stride_x + col, mask, EVEN)
        mean = load_fp32(mean_ptr + row, row < rows, ROWS == 1)
        rstd = load_fp32(rstd_ptr + row, row < rows, ROWS == 1)
        xhat = (x - mean) * rstd
        if DW:
            dw += dy * xhat
            db += dy
        g = dy * w
        # Where a lane is masked, dy and so g are 0: xhat there reaches neither sum.
        mean_g = tl.sum(g, axis=1)[:, None] * (1.0 / H)
        mean_gx = tl.sum(g * xhat, axis=1)[:, None] * (1.0 / H)
        dx = rstd * (g - mean_g - xhat * mean_gx)
        store_as(dx_ptr + row * H + col, dx, mask, EVEN)
    if DW:
        HALVES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
        store_partial(dw_ptr + program * H, dw, H, BLOCK, ROWS, HALVES)
        store_partial(dw_ptr + (tl.num_programs(0) + program) * H, db, H, BLOCK, ROWS, HALVES)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., H] in the dtype of x, and mean and rstd [rows]."""
    rows2d, width = as_rows(x), x.shape[-1]
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(len(rows2d), dtype=torch.float32) for _ in range(2))
    block, rows, warps = row_block(width, TABLE["layer_norm_forward"]["tile"])
    start(
        _forward, triton.cdiv(len(rows2d), rows), rows2d, weight.contiguous(), bias.contiguous(), y, mean, rstd,
        len(rows2d), rows2d.stride(0), eps, H=width, BLOCK=block, ROWS=rows, warps=warps,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the dtype of x; dw and db in the dtype of weight (empty unless wanted)."""
    dy2d, x2d, width = as_rows(dy), as_rows(x), x.shape[-1]
    table = TABLE["layer_norm_backward"]
    block, rows, warps = row_block(width, table["tile"])
    share, programs = split_rows(len(x2d), rows, table["programs_dw" if want_dw else "programs"])
    dx = x.new_empty(x.shape)
    partial = x.new_empty((2, programs, width) if want_dw else (0,), dtype=torch.float32)
    start(
        _backward, programs, dy2d, x2d, weight.contiguous(), mean, rstd, dx, partial, len(x2d), share,
        dy2d.stride(0), x2d.stride(0), H=width, BLOCK=block, ROWS=rows, DW=want_dw,
        warps=warps,
    )  # fmt: skip
    if not want_dw:
        return dx, weight.new_empty(0), weight.new_empty(0)
    dw, db = (sum_partials(part, x, rows).to(weight.dtype) for part in partial)
    return dx, dw, db
