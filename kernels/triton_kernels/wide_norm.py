"""Triton kernels of RMSNorm and LayerNorm for rows too wide for one block of registers (mathematics and bytes: `norms`).

A program walks over its row in blocks of columns, once for the statistics and once for the result, so each direction
reads its inputs twice. The weight's gradient is a kernel of its own, whose programs own a block of columns and a share of
the rows: no register holds a whole row. Rows up to `norms.MAX_WIDTH` take `rms_norm` and `layer_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import as_rows, load_fp32, start, store_as
from .partials import split_rows


@triton.jit
def _forward(
    x_ptr, r_ptr,  # [rows, H]; r is read only if ADD
    w_ptr, b_ptr,  # [H]; b is read only if CENTRE
    y_ptr, s_ptr,  # [rows, H] contiguous; s is written only if ADD
    mean_ptr, rstd_ptr,  # [rows] fp32; mean is written only if CENTRE
    stride_x, stride_r, eps, offset,
    H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, r_row, y_row, s_row = x_ptr + row * stride_x, r_ptr + row * stride_r, y_ptr + row * H, s_ptr + row * H
    EVEN: tl.constexpr = H % BLOCK == 0
    mean, squares, seen = 0.0, 0.0, 0.0
    for first in range(0, H, BLOCK):
        col = first + tl.arange(0, BLOCK)
        mask = col < H
        x = load_fp32(x_row + col, mask, EVEN)
        if ADD:
            s = (x + load_fp32(r_row + col, mask, EVEN)).to(s_ptr.dtype.element_ty)
            store_as(s_row + col, s, mask, EVEN)
            x = s.to(tl.float32)
        if CENTRE:
            # Blocks are merged as in Chan, Golub and LeVeque (1979): no mean^2 is subtracted from a sum of squares.
            n = tl.sum(mask.to(tl.float32), axis=0)
            here = tl.sum(x, axis=0) / n
            centred = tl.where(mask, x - here, 0.0)
            apart = here - mean
            squares += tl.sum(centred * centred, axis=0) + apart * apart * (seen * n / (seen + n))
            mean += apart * (n / (seen + n))
            seen += n
        else:
            squares += tl.sum(x * x, axis=0)
    rstd = tl.rsqrt(squares * (1.0 / H) + eps)
    if ADD:
        tl.debug_barrier()  # s is read again, whichever thread wrote it
    for first in range(0, H, BLOCK):
        col = first + tl.arange(0, BLOCK)
        mask = col < H
        x = load_fp32((s_row if ADD else x_row) + col, mask, EVEN)
        w = load_fp32(w_ptr + col, mask, EVEN)
        if CENTRE:
            y = (x - mean) * rstd * w + load_fp32(b_ptr + col, mask, EVEN)
        else:
            xhat = x * rstd
            if LLAMA:
                xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
            y = xhat * (w + offset)
        store_as(y_row + col, y, mask, EVEN)
    tl.store(rstd_ptr + row, rstd)
    if CENTRE:
        tl.store(mean_ptr + row, mean)


@triton.jit
def _backward(
    dy_ptr, x_ptr, ds_ptr,  # [rows, H]; ds is read only if ADD
    w_ptr,  # [H]
    mean_ptr, rstd_ptr,  # [rows] fp32; mean is read only if CENTRE
    dx_ptr,  # [rows, H] contiguous
    stride_dy, stride_x, stride_ds, offset,
    H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_row, x_row, ds_row = dy_ptr + row * stride_dy, x_ptr + row * stride_x, ds_ptr + row * stride_ds
    EVEN: tl.constexpr = H % BLOCK == 0
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTRE else 0.0
    sum_g, sum_gx = 0.0, 0.0
    for first in range(0, H, BLOCK):
        col = first + tl.arange(0, BLOCK)
        mask = col < H
        g = load_fp32(dy_row + col, mask, EVEN) * (load_fp32(w_ptr + col, mask, EVEN) + offset)
        sum_gx += tl.sum(g * ((load_fp32(x_row + col, mask, EVEN) - mean) * rstd), axis=0)
        if CENTRE:
            sum_g += tl.sum(g, axis=0)
    for first in range(0, H, BLOCK):
        col = first + tl.arange(0, BLOCK)
        mask = col < H
        g = load_fp32(dy_row + col, mask, EVEN) * (load_fp32(w_ptr + col, mask, EVEN) + offset)
        xhat = (load_fp32(x_row + col, mask, EVEN) - mean) * rstd
        dx = rstd * (g - sum_g * (1.0 / H) - xhat * (sum_gx * (1.0 / H)))
        if ADD:
            dx += load_fp32(ds_row + col, mask, EVEN)
        store_as(dx_ptr + row * H + col, dx, mask, EVEN)


@triton.jit
def _weight_gradient(
    dy_ptr, x_ptr,  # [rows, H]
    mean_ptr, rstd_ptr,  # [rows] fp32; mean is read only if CENTRE
    dw_ptr, db_ptr,  # [shares, H] fp32; db is written only if CENTRE
    rows, share, stride_dy, stride_x,
    H: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    part = (tl.program_id(0) // BLOCKS).to(tl.int64)
    col = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = col < H
    EVEN: tl.constexpr = H % BLOCK == 0
    dw, db = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    first = part * share
    for step in range(0, tl.minimum(share, rows - first)):
        row = first + step  # 64 bits, whatever the loop counts in
        dy = load_fp32(dy_ptr + row * stride_dy + col, mask, EVEN)
        x = load_fp32(x_ptr + row * stride_x + col, mask, EVEN)
        if CENTRE:
            x -= tl.load(mean_ptr + row)
            db += dy
        xhat = x * tl.load(rstd_ptr + row)
        if LLAMA:
            xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        dw += dy * xhat
    store_as(dw_ptr + part * H + col, dw, mask, EVEN)
    if CENTRE:
        store_as(db_ptr + part * H + col, db, mask, EVEN)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float, casting: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [..., H] in `dtype`, s = x + residual (empty without one), mean (LayerNorm, which has a bias) and rstd [rows]."""
    rows2d, width, centre = as_rows(x), x.shape[-1], bias is not None
    added = as_rows(residual) if residual is not None else rows2d
    y, s = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape if residual is not None else (0,))
    mean, rstd = (x.new_empty(n, dtype=torch.float32) for n in (len(rows2d) if centre else 0, len(rows2d)))
    table, weight = TABLE["wide_norm"], weight.contiguous()
    start(
        _forward, len(rows2d), rows2d, added, weight, weight if bias is None else bias.contiguous(), y, s, mean, rstd,
        rows2d.stride(0), added.stride(0), eps, offset, H=width, BLOCK=table["block"], ADD=residual is not None,
        CENTRE=centre, LLAMA=casting == "llama", warps=table["warps"],
    )  # fmt: skip
    return y, s, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, ds: Tensor | None, offset: float,
    casting: str, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in the dtype of x; dw and db in the dtype of weight (empty unless wanted); LayerNorm where there is a mean."""
    dy2d, x2d, width, centre = as_rows(dy), as_rows(x), x.shape[-1], mean is not None
    ds2d = as_rows(ds) if ds is not None else dy2d
    means = mean if mean is not None else rstd
    table, dx = TABLE["wide_norm"], x.new_empty(x.shape)
    shape = {"H": width, "BLOCK": table["block"], "CENTRE": centre, "warps": table["warps"]}
    start(
        _backward, len(x2d), dy2d, x2d, ds2d, weight.contiguous(), means, rstd, dx,
        dy2d.stride(0), x2d.stride(0), ds2d.stride(0), offset, ADD=ds is not None, **shape,
    )  # fmt: skip
    if not want_dw:
        return dx, weight.new_empty(0), weight.new_empty(0)
    share, parts = split_rows(len(x2d), 1, table["shares"])
    dw, db = (x.new_empty(parts, width, dtype=torch.float32) for _ in range(2))
    start(
        _weight_gradient, parts * triton.cdiv(width, table["block"]), dy2d, x2d, means, rstd, dw, db, len(x2d), share,
        dy2d.stride(0), x2d.stride(0), LLAMA=casting == "llama", **shape,
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype) if centre else weight.new_empty(0)
