"""Triton kernels of RMSNorm and of RMSNorm with the residual add (mathematics and bytes: `norms`).

Forward: one block of registers holds a row (or several narrow rows). Backward: each program walks over its share of
the rows with the weight, and with dw if wanted, in registers, so the weight is read once per program and not once per
row; the partial dw of all programs are summed by torch in a fixed order. All arithmetic is fp32; casts happen at load
and store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import as_rows, at_most, load_fp32, row_block, start, store_as
from .partials import split_rows, store_partial, sum_partials


@triton.jit
def _forward(
    x_ptr,  # [rows, H]
    r_ptr,  # [rows, H], read only if ADD
    w_ptr,  # [H]
    y_ptr,  # [rows, H] contiguous
    s_ptr,  # [rows, H] contiguous, written only if ADD
    rstd_ptr,  # [rows] fp32
    rows,
    stride_x,
    stride_r,
    eps,
    offset,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < H)
    EVEN: tl.constexpr = H == BLOCK and ROWS == 1
    x = load_fp32(x_ptr + row * stride_x + col, mask, EVEN)
    if ADD:
        s = (x + load_fp32(r_ptr + row * stride_r + col, mask, EVEN)).to(s_ptr.dtype.element_ty)
        store_as(s_ptr + row * H + col, s, mask, EVEN)
        x = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / H) + eps)[:, None]
    w = load_fp32(w_ptr + col, col < H, H == BLOCK)
    if OFFSET:
        w += offset
    xhat = x * rstd
    if LLAMA:
        xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
    store_as(y_ptr + row * H + col, xhat * w, mask, EVEN)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward(
    dy_ptr,  # [rows, H]
    x_ptr,  # [rows, H]: x, or x + residual
    w_ptr,  # [H]
    rstd_ptr,  # [rows] fp32
    ds_ptr,  # [rows, H], read only if ADD
    dx_ptr,  # [rows, H] contiguous
    dw_ptr,  # [programs, H] fp32, written only if DW
    rows,
    rows_per_program,  # a multiple of ROWS
    stride_dy,
    stride_x,
    stride_ds,
    offset,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    DW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    col = tl.arange(0, BLOCK)[None, :]
    EVEN: tl.constexpr = H == BLOCK and ROWS == 1
    w = load_fp32(w_ptr + col, col < H, H == BLOCK)
    if OFFSET:
        w += offset
    if DW:
        dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for top in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        row = (top + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (col < H)
        dy = load_fp32(dy_ptr + row * stride_dy + col, mask, EVEN)
        x = load_fp32(x_ptr + row * stride_x + col, mask, EVEN)
        rstd = load_fp32(rstd_ptr + row, row < rows, ROWS == 1)
        xhat = x * rstd
        if DW:
            # Before the sum over the row, so that the rounded xhat does not have to live across it.
            dw += dy * (xhat.to(x_ptr.dtype.element_ty).to(tl.float32) if LLAMA else xhat)
        g = dy * w
        mean = tl.sum(g * xhat, axis=1)[:, None] * (1.0 / H)
        dx = rstd * (g - xhat * mean)
        if ADD:
            dx += load_fp32(ds_ptr + row * stride_ds + col, mask, EVEN)
        store_as(dx_ptr + row * H + col, dx, mask, EVEN)
    if DW:
        store_partial(dw_ptr + program * H, dw, H, BLOCK, ROWS, x_ptr.dtype.element_ty.primitive_bitwidth == 16)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, casting: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., H] in `dtype`, s = x + residual (empty without a residual), rstd [rows]."""
    rows2d, width = as_rows(x), x.shape[-1]
    add = residual is not None
    added = as_rows(residual) if residual is not None else rows2d
    y = x.new_empty(x.shape, dtype=dtype)
    s = x.new_empty(x.shape if add else (0,))
    rstd = x.new_empty(len(rows2d), dtype=torch.float32)
    block, rows, warps = row_block(width, TABLE["rms_norm_forward"]["tile"])
    start(
        _forward, triton.cdiv(len(rows2d), rows), rows2d, added, weight.contiguous(), y, s, rstd, len(rows2d),
        rows2d.stride(0), added.stride(0), eps, offset,
        H=width, BLOCK=block, ROWS=rows, ADD=add, OFFSET=offset != 0.0, LLAMA=casting == "llama",
        warps=warps, registers=at_most(x, TABLE["rms_norm_forward"]["registers"]) if rows == 1 else None,
    )  # fmt: skip
    return y, s, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, ds: Tensor | None, offset: float, casting: str, want_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx in the dtype of x, and dw in the dtype of weight (empty unless wanted)."""
    dy2d, x2d, width = as_rows(dy), as_rows(x), x.shape[-1]
    ds2d = as_rows(ds) if ds is not None else dy2d
    table = TABLE["rms_norm_backward"]
    block, rows, warps = row_block(width, table["tile"])
    share, programs = split_rows(len(x2d), rows, table["programs_dw" if want_dw else "programs"])
    dx = x.new_empty(x.shape)
    dw = x.new_empty((programs, width) if want_dw else (0,), dtype=torch.float32)
    start(
        _backward, programs, dy2d, x2d, weight.contiguous(), rstd, ds2d, dx, dw, len(x2d), share,
        dy2d.stride(0), x2d.stride(0), ds2d.stride(0), offset,
        H=width, BLOCK=block, ROWS=rows, ADD=ds is not None, OFFSET=offset != 0.0,
        LLAMA=casting == "llama", DW=want_dw,
        warps=warps, registers=_bound(x, rows, warps, want_dw, ds is not None),
    )  # fmt: skip
    return dx, sum_partials(dw, x, rows).to(weight.dtype) if want_dw else weight.new_empty(0)


def _bound(x: Tensor, rows: int, warps: int, want_dw: bool, add: bool) -> int | None:
    """The bound on registers of a backward launch; None where one would gain nothing, or spill."""
    table = TABLE["rms_norm_backward"]
    if want_dw:
        return at_most(x, table["registers_dw" if rows == 1 and warps <= 8 else "registers_dw_wide"])
    return at_most(x, table["registers"]) if rows == 1 and not add else None
