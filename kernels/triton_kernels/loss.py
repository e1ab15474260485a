"""Triton kernels on rows of logits: softmax statistics, and the gradient written once (mathematics and bytes: `loss`).

`_stats` walks over a row in blocks with a running maximum, so any vocabulary fits; one row kept in registers spills
beyond 32,768 columns. `_gradient` is elementwise given lse, and folds in the upstream gradients of logp, lse and
entropy, softcap and scale, so that nothing passes over the logits again. It may write over its input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_table import TABLE
from .launch import exp, start


@triton.jit
def _cap(z, softcap, scale, CAP: tl.constexpr, SCALE: tl.constexpr):
    """z after scale and cap; and its derivative with respect to the logit (1.0 with neither)."""
    slope = 1.0
    if SCALE:
        z = z * scale
        slope = scale
    if CAP:
        t = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
        z = softcap * t
        slope = slope * (1.0 - t * t)
    return z, slope


@triton.jit
def _stats(
    z_ptr,  # [rows, V]
    label_ptr,  # [rows] int64
    logp_ptr,  # [rows] fp32
    lse_ptr,  # [rows] fp32
    rest_ptr,  # [rows] fp32
    entropy_ptr,  # [rows] fp32, written only if ENTROPY
    argmax_ptr,  # [rows] int64, written only if ARGMAX
    vocab,
    stride,
    softcap,
    scale,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    at = (
        tl.arange(0, PARTS)[:, None, None] * (LANES * WIDTH)
        + tl.arange(0, LANES)[None, :, None] * WIDTH
        + tl.arange(0, WIDTH)[None, None, :]
    )
    # A finite start instead of -inf: top - new below must not become inf - inf.
    top = tl.full([LANES], -3.0e38, dtype=tl.float32)
    total, weighted = tl.zeros([LANES], dtype=tl.float32), tl.zeros([LANES], dtype=tl.float32)
    best_at = tl.zeros([LANES], dtype=tl.int32)
    for first in range(0, vocab, PARTS * LANES * WIDTH):
        col = first + at
        z = tl.load(z_row + col, mask=col < vocab, other=-float("inf")).to(tl.float32)
        if CAP or SCALE:
            # The cap would make the masked -inf finite, a negative scale +inf.
            z, _ = _cap(z, softcap, scale, CAP, SCALE)
            z = tl.where(col < vocab, z, -float("inf"))
        new = tl.maximum(top, _over_lanes(z, "max"))
        if ARGMAX:
            found = _over_lanes(tl.where(z == new[None, :, None], col, 2147483647), "min")
            best_at = tl.where(new > top, found, best_at)
        below = z - new[None, :, None]
        e = exp(below)
        shrink = exp(top - new)
        if ENTROPY:
            moved = tl.where(total > 0.0, (top - new) * total, 0.0)
            weighted = shrink * (weighted + moved) + _over_lanes(tl.where(e > 0.0, e * below, 0.0), "sum")
        total = total * shrink + _over_lanes(e, "sum")
        top = new
    highest = tl.max(top, axis=0)
    shrink = exp(top - highest)
    if ENTROPY:
        moved = tl.where(total > 0.0, (top - highest) * total, 0.0)
        weighted_all = tl.sum(shrink * (weighted + moved), axis=0)
    sum_all = tl.sum(total * shrink, axis=0)
    log_sum = tl.log(sum_all)
    lse = highest + log_sum
    label = tl.load(label_ptr + row)
    inside = (label >= 0) & (label < vocab)
    z_label = tl.load(z_row + label, mask=inside, other=float("nan")).to(tl.float32)
    z_label, _ = _cap(z_label, softcap, scale, CAP, SCALE)
    tl.store(logp_ptr + row, (z_label - highest) - log_sum)
    tl.store(lse_ptr + row, lse)
    # What rounding takes from lse, so that the gradient keeps its digits at logits of 1e4.
    tl.store(rest_ptr + row, (highest - lse) + log_sum)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_sum - weighted_all / sum_all)
    if ARGMAX:
        best_at = tl.where(top == highest, best_at, 2147483647)
        tl.store(argmax_ptr + row, tl.min(best_at, axis=0).to(tl.int64))


@triton.jit
def _over_lanes(x, HOW: tl.constexpr):
    """[LANES] of x [PARTS, LANES, WIDTH]: all elements that one thread holds, so nothing is exchanged."""
    if HOW == "max":
        return tl.max(tl.max(x, axis=2), axis=0)
    elif HOW == "min":
        return tl.min(tl.min(x, axis=2), axis=0)
    else:
        return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _gradient(
    z_ptr,  # [rows, V]
    out_ptr,  # [rows, V]; may be z_ptr
    label_ptr,  # [rows] int64
    lse_ptr,  # [rows] fp32
    rest_ptr,  # [rows] fp32
    entropy_ptr,  # [rows] fp32, read only with G_ENTROPY
    g_logp_ptr,  # [rows] fp32 each, read only with their flag
    g_lse_ptr,
    g_entropy_ptr,
    vocab,
    blocks,
    stride,
    stride_out,
    softcap,
    scale,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    G_LOGP: tl.constexpr,
    G_LSE: tl.constexpr,
    G_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks) * BLOCK
    col = first + tl.arange(0, BLOCK)
    mask = col < vocab
    z_row, out_row = z_ptr + row * stride, out_ptr + row * stride_out
    z = tl.load(z_row + col, mask=mask, other=0.0).to(tl.float32)
    lse, rest = tl.load(lse_ptr + row), tl.load(rest_ptr + row)
    factor, g_entropy, entropy = 0.0, 0.0, 0.0
    if G_LSE:
        factor += tl.load(g_lse_ptr + row)
    if G_ENTROPY:
        g_entropy, entropy = tl.load(g_entropy_ptr + row), tl.load(entropy_ptr + row)
    if G_LOGP:
        g_logp = tl.load(g_logp_ptr + row)
        factor -= g_logp
        # The label's logit by itself, so that no lane compares its column: read before, written after the block's.
        label = tl.load(label_ptr + row)
        here = (label >= first) & (label < first + BLOCK) & (label < vocab)
        z_label = tl.load(z_row + label, mask=here, other=0.0).to(tl.float32)
        dz_label, slope = _through_softmax(
            z_label, lse, rest, factor, g_entropy, entropy, softcap, scale, CAP, SCALE, G_ENTROPY
        )
        dz_label += g_logp * slope
        tl.debug_barrier()
    dz, _ = _through_softmax(z, lse, rest, factor, g_entropy, entropy, softcap, scale, CAP, SCALE, G_ENTROPY)
    tl.store(out_row + col, dz.to(out_ptr.dtype.element_ty), mask=mask)
    if G_LOGP:
        tl.debug_barrier()
        tl.store(out_row + label, dz_label.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _through_softmax(
    z, lse, rest, factor, g_entropy, entropy, softcap, scale,
    CAP: tl.constexpr, SCALE: tl.constexpr, G_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient without the label's part, and the slope of scale and cap."""
    z, slope = _cap(z, softcap, scale, CAP, SCALE)
    p = exp(z - lse)  # still to be times exp(-rest), which the factor carries
    if G_ENTROPY:
        surprise = tl.where(p > 0.0, (z - lse) - rest, 0.0)
        dz = p * ((factor - g_entropy * (surprise + entropy)) * exp(-rest))
    else:
        dz = p * (factor * exp(-rest))
    if CAP or SCALE:
        dz *= slope
    return dz, slope


def stats(
    z: Tensor, labels: Tensor, softcap: float | None, scale: float, want_entropy: bool, want_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy [rows] in fp32, argmax [rows] int64 (these two empty unless wanted), and what lse lost when it
    was rounded, [rows] fp32."""
    z, labels = z if z.stride(-1) == 1 else z.contiguous(), labels.contiguous()
    rows, vocab = z.shape
    logp, lse, rest = (z.new_empty(rows, dtype=torch.float32) for _ in range(3))
    entropy = z.new_empty(rows if want_entropy else 0, dtype=torch.float32)
    argmax = labels.new_empty(rows if want_argmax else 0)
    settings = TABLE["loss_stats"]
    start(
        _stats, rows, z, labels, logp, lse, rest, entropy, argmax, vocab, z.stride(0), softcap or 1.0, scale,
        CAP=softcap is not None, SCALE=scale != 1.0, ENTROPY=want_entropy, ARGMAX=want_argmax,
        PARTS=settings["parts"], LANES=32 * settings["warps"], WIDTH=16 // z.element_size(), warps=settings["warps"],
    )  # fmt: skip
    return logp, lse, entropy, argmax, rest


def gradient(
    z: Tensor, labels: Tensor, lse: Tensor, rest: Tensor, entropy: Tensor | None, grads: tuple[Tensor | None, ...],
    softcap: float | None, scale: float, *, out: Tensor,
) -> None:  # fmt: skip
    """out <- the gradient with respect to the logits, given the upstream gradients of (logp, lse, entropy)."""
    z, labels = z if z.stride(-1) == 1 else z.contiguous(), labels.contiguous()
    rows, vocab = z.shape
    g_logp, g_lse, g_entropy = (None if g is None else g.float().contiguous() for g in grads)
    settings = TABLE["loss_gradient"]
    blocks = triton.cdiv(vocab, settings["block"])
    unused = lse
    start(
        _gradient, rows * blocks, z, out, labels, lse, rest, unused if entropy is None else entropy,
        *(unused if g is None else g for g in (g_logp, g_lse, g_entropy)),
        vocab, blocks, z.stride(0), out.stride(0), softcap or 1.0, scale,
        CAP=softcap is not None, SCALE=scale != 1.0,
        G_LOGP=g_logp is not None, G_LSE=g_lse is not None, G_ENTROPY=g_entropy is not None,
        BLOCK=settings["block"], warps=settings["warps"],
    )  # fmt: skip
