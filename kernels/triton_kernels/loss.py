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
from .launch import start


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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    # A finite start instead of -inf: highest - new below must not become inf - inf.
    highest, total, weighted = -3.0e38, 0.0, 0.0
    best, best_at = -float("inf"), 0
    for first in range(0, vocab, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(z_row + col, mask=col < vocab, other=-float("inf")).to(tl.float32)
        if CAP or SCALE:
            # The cap would make the masked -inf finite, a negative scale +inf.
            z, _ = _cap(z, softcap, scale, CAP, SCALE)
            z = tl.where(col < vocab, z, -float("inf"))
        block_max = tl.max(z, axis=0)
        if ARGMAX:
            block_at = first + tl.argmax(z, axis=0)
            best_at = tl.where(block_max > best, block_at, best_at)
            best = tl.maximum(best, block_max)
        new = tl.maximum(highest, block_max)
        shrink = tl.exp(highest - new)
        e = tl.exp(z - new)
        if ENTROPY:
            moved = tl.where(total > 0.0, (highest - new) * total, 0.0)
            weighted = shrink * (weighted + moved) + tl.sum(tl.where(e > 0.0, e * (z - new), 0.0), axis=0)
        total = total * shrink + tl.sum(e, axis=0)
        highest = new
    lse = highest + tl.log(total)
    label = tl.load(label_ptr + row)
    inside = (label >= 0) & (label < vocab)
    z_label = tl.load(z_row + label, mask=inside, other=float("nan")).to(tl.float32)
    z_label, _ = _cap(z_label, softcap, scale, CAP, SCALE)
    tl.store(logp_ptr + row, z_label - lse)
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    if ARGMAX:
        tl.store(argmax_ptr + row, best_at)


@triton.jit
def _gradient(
    z_ptr,  # [rows, V]
    out_ptr,  # [rows, V]; may be z_ptr
    label_ptr,  # [rows] int64
    lse_ptr,  # [rows] fp32
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
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < vocab
    z = tl.load(z_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    z, slope = _cap(z, softcap, scale, CAP, SCALE)
    lse = tl.load(lse_ptr + row)
    p = tl.exp(z - lse)
    factor = 0.0
    if G_LOGP:
        g_logp = tl.load(g_logp_ptr + row)
        factor -= g_logp
    if G_LSE:
        factor += tl.load(g_lse_ptr + row)
    if G_ENTROPY:
        surprise = tl.where(p > 0.0, z - lse, 0.0)
        dz = p * (factor - tl.load(g_entropy_ptr + row) * (surprise + tl.load(entropy_ptr + row)))
    else:
        dz = p * factor
    if G_LOGP:
        dz += tl.where(col == tl.load(label_ptr + row).to(tl.int32), g_logp, 0.0)
    if CAP or SCALE:
        dz *= slope
    tl.store(out_ptr + row * stride_out + col, dz.to(out_ptr.dtype.element_ty), mask=mask)


def stats(
    z: Tensor, labels: Tensor, softcap: float | None, scale: float, want_entropy: bool, want_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy [rows] in fp32 and argmax [rows] int64 (the last two empty unless wanted)."""
    z, labels = z if z.stride(-1) == 1 else z.contiguous(), labels.contiguous()
    rows, vocab = z.shape
    logp, lse = z.new_empty(rows, dtype=torch.float32), z.new_empty(rows, dtype=torch.float32)
    entropy = z.new_empty(rows if want_entropy else 0, dtype=torch.float32)
    argmax = labels.new_empty(rows if want_argmax else 0)
    settings = TABLE["loss_stats"]
    start(
        _stats, rows, z, labels, logp, lse, entropy, argmax, vocab, z.stride(0), softcap or 1.0, scale,
        CAP=softcap is not None, SCALE=scale != 1.0, ENTROPY=want_entropy, ARGMAX=want_argmax,
        BLOCK=settings["block"], warps=settings["warps"],
    )  # fmt: skip
    return logp, lse, entropy, argmax


def gradient(
    z: Tensor, labels: Tensor, lse: Tensor, entropy: Tensor | None, grads: tuple[Tensor | None, ...],
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
        _gradient, rows * blocks, z, out, labels, lse, unused if entropy is None else entropy,
        *(unused if g is None else g for g in (g_logp, g_lse, g_entropy)),
        vocab, blocks, z.stride(0), out.stride(0), softcap or 1.0, scale,
        CAP=softcap is not None, SCALE=scale != 1.0,
        G_LOGP=g_logp is not None, G_LSE=g_lse is not None, G_ENTROPY=g_entropy is not None,
        BLOCK=settings["block"], warps=settings["warps"],
    )  # fmt: skip
