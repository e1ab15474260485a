"""Triton kernels of the gated activations (mathematics and bytes: `glu`).

Flat blocks over the elements, so that no lane is wasted at widths that are not powers of two; rows of e and g may lie
apart (halves of a packed gate_up product). tanh goes through exp(-2|u|): libdevice's does not exist in the interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import as_rows, at_most, exp, load_fp32, sigmoid, start, store_as


@triton.jit
def _activate(e, ACT: tl.constexpr):
    """act(e) and act'(e)."""
    if ACT == "silu":
        sigma = sigmoid(e)
        return e * sigma, sigma * (1.0 + e * (1.0 - sigma))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(e * 0.7071067811865476))
        return e * cdf, cdf + e * 0.3989422804014327 * exp(-0.5 * e * e)
    else:
        u = 0.7978845608028654 * e * (1.0 + 0.044715 * e * e)
        q = exp(-2.0 * tl.abs(u))
        root = tl.rsqrt(1.0 + q)
        s = root * root  # 1 / (1 + q)
        half = tl.where(u < 0.0, q * s, s)  # (1 + tanh u) / 2
        slope = 0.7978845608028654 * (1.0 + 0.134145 * e * e)
        # (1 - tanh^2 u) / 2 is 2 q s^2; 1 - half would lose its digits where half is nearly 1.
        return e * half, half + 2.0 * e * q * s * s * slope


@triton.jit
def _differentiate(dh, e, ACT: tl.constexpr):
    """act(e), dh act(e) and dh act'(e). For silu, act' = sigma + act (1 - sigma), with what dh act(e) already is."""
    if ACT == "silu":
        sigma = sigmoid(e)
        act = e * sigma
        along = dh * act
        return act, along, dh * sigma + along * (1.0 - sigma)
    else:
        act, slope = _activate(e, ACT)
        return act, dh * act, dh * slope


@triton.jit
def _place(blocks, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Row and first column of this program; FLAT: all elements are one row, and the division falls away."""
    program = tl.program_id(0)
    if FLAT:
        row, first = tl.zeros([], dtype=tl.int64), program.to(tl.int64) * BLOCK
    else:
        row, first = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    return row, first


@triton.jit
def _forward(
    e_ptr, g_ptr, h_ptr, width, blocks, stride_e, stride_g,
    ACT: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row, first = _place(blocks, BLOCK, FLAT)
    col = tl.arange(0, BLOCK)
    mask = first + col < width
    e = load_fp32(e_ptr + (row * stride_e + first) + col, mask, EVEN)
    g = load_fp32(g_ptr + (row * stride_g + first) + col, mask, EVEN)
    act, _ = _activate(e, ACT)
    store_as(h_ptr + (row * width + first) + col, act * g, mask, EVEN)


@triton.jit
def _backward(
    dh_ptr, e_ptr, g_ptr, de_ptr, dg_ptr, h_ptr, width, blocks, stride_dh, stride_e, stride_g,
    ACT: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, WANT_H: tl.constexpr,
):  # fmt: skip
    row, first = _place(blocks, BLOCK, FLAT)
    col = tl.arange(0, BLOCK)
    mask = first + col < width
    dh = load_fp32(dh_ptr + (row * stride_dh + first) + col, mask, EVEN)
    e = load_fp32(e_ptr + (row * stride_e + first) + col, mask, EVEN)
    g = load_fp32(g_ptr + (row * stride_g + first) + col, mask, EVEN)
    act, dg, de = _differentiate(dh, e, ACT)
    out = row * width + first
    store_as(dg_ptr + out + col, dg, mask, EVEN)
    store_as(de_ptr + out + col, de * g, mask, EVEN)
    if WANT_H:
        store_as(h_ptr + out + col, act * g, mask, EVEN)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """All as [rows, width]; as one long row each when all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [as_rows(t) for t in tensors]


def forward(e: Tensor, g: Tensor, activation: str) -> Tensor:
    """h, contiguous, in the dtype of e."""
    h = e.new_empty(e.shape)
    e2d, g2d = _rows(e, g)
    settings = TABLE["glu_forward"]
    blocks = triton.cdiv(e2d.shape[1], settings["block"])
    start(
        _forward, blocks * len(e2d), e2d, g2d, h, e2d.shape[1], blocks, e2d.stride(0), g2d.stride(0),
        ACT=activation, BLOCK=settings["block"], FLAT=len(e2d) == 1, EVEN=e2d.shape[1] % settings["block"] == 0,
        registers=at_most(e, settings["registers"]) if activation == "silu" else None, warps=settings["warps"],
    )  # fmt: skip
    return h


def backward(dh: Tensor, e: Tensor, g: Tensor, activation: str, want_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """de, dg and h (empty unless wanted), contiguous."""
    de, dg, h = e.new_empty(e.shape), e.new_empty(e.shape), e.new_empty(e.shape if want_h else 0)
    dh2d, e2d, g2d = _rows(dh, e, g)
    settings = TABLE["glu_backward"]
    blocks = triton.cdiv(e2d.shape[1], settings["block"])
    bounded = activation == "silu" and len(e2d) == 1 and not want_h
    start(
        _backward, blocks * len(e2d), dh2d, e2d, g2d, de, dg, h, e2d.shape[1], blocks,
        dh2d.stride(0), e2d.stride(0), g2d.stride(0),
        ACT=activation, BLOCK=settings["block"], FLAT=len(e2d) == 1, EVEN=e2d.shape[1] % settings["block"] == 0, WANT_H=want_h,
        registers=at_most(e, settings["registers"]) if bounded else None, warps=settings["warps"],
    )  # fmt: skip
    return de, dg, h
