"""Attention of packed rows on a CPU: one causal product per document, in place of one product under a T x T mask.

transformers recognizes packed rows by position ids that restart and builds a boolean mask [B, 1, T, T] for "sdpa". On a
CPU that mask costs more than the attention: 8,192 tokens in 8 documents, 4 heads of 32: 0.57 s and 256 MiB with the
mask, 0.034 s and 4 MiB document by document (measured on 2 cores). The numbers are those of the masked product: a token
sees the same keys.

Registered with transformers under `NAME`; a model set to it uses it only where `document_lengths` reached the
attention, which the patched causal LM sees to when position ids are given without mask or cache. Everything else
(generation, padding masks, windows shorter than a document, compilation) takes transformers' "sdpa". GPUs keep their
own attention: they have kernels for packed rows.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing

from .patch_match import AnyModule

NAME = "sdpa_by_document"

# Tokens up to which a 16-bit backward pass as batched products beats torch's kernel: 2,048 tokens in documents of 64,
# 128 and 256, 9 heads of 64, bf16 on one AMX core: 24, 31 and 49 ms against 50, 68 and 66 (measured). At 512, and in
# fp32, it does not.
_SHORT = 256
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_state = threading.local()


def lengths_of(position_ids: Tensor) -> list[list[int]] | None:
    """Document lengths of each row of position_ids [B, T]: a document starts where the step is not +1.

    None when tracing (values are unknown) or when each row is one document, where "sdpa" needs no mask either.
    """
    if position_ids.dim() != 2 or position_ids.device.type != "cpu" or is_tracing(position_ids):
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    rows = []
    for row in starts:
        bounds = [0, *(row.nonzero().squeeze(1) + 1).tolist(), position_ids.shape[1]]
        rows.append([end - start for start, end in itertools.pairwise(bounds)])
    return rows


@contextlib.contextmanager
def unmasked(longest: int) -> Iterator[None]:
    """Inside, `NAME` builds no mask unless a sliding window is shorter than `longest`, the tokens of the longest
    document.
    """
    previous, _state.longest = getattr(_state, "longest", None), longest
    try:
        yield
    finally:
        _state.longest = previous


def _mask(*, local_size: int | None = None, **kwargs) -> Tensor | None:
    longest = None if torch.compiler.is_compiling() else getattr(_state, "longest", None)
    causal = not kwargs.get("use_vmap") and not kwargs.get("allow_is_bidirectional_skip")  # and nothing added to it
    if longest is not None and causal and (local_size is None or local_size >= longest):
        return None
    return sdpa_mask(local_size=local_size, **kwargs)


def _attend(
    module: AnyModule, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, document_lengths: Sequence[Sequence[int]] | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, heads, T, D], key and value [B, kv heads, T, D] -> [B, T, heads, D]."""
    causal = getattr(module, "is_causal", True) and key.shape[2] == query.shape[2]
    if document_lengths is None or attention_mask is not None or not causal:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if len(document_lengths) != len(query):  # position ids of one row stand for all
        document_lengths = [document_lengths[0]] * len(query)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if dropout == 0.0 and query.dtype != torch.float64:
        return _ByDocument.apply(query, key, value, document_lengths, scaling or query.shape[-1] ** -0.5), None
    grouped, rows = key.shape[1] != query.shape[1], []
    for at, lengths in enumerate(document_lengths):
        # split, not slices: the backward pass of split is one concatenation, that of n slices n sums of whole rows.
        parts = zip(*(t[at : at + 1].split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
        done = [
            F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
            )
            for q, k, v in parts
        ]
        rows.append(torch.cat([part.transpose(1, 2) for part in done], dim=1))
    return torch.cat(rows), None


class _ByDocument(torch.autograd.Function):
    """Causal attention inside each document, [B, heads, T, D] -> [B, T, heads, D], through torch's own CPU kernels.

    They are called on the slices of one row without a copy, and up to `_SHORT` tokens of 16 bits the backward pass is
    five batched products:

        P = exp(s Q K^T - lse)    dV = P^T dO    dS = s P (dO V^T - rowsum(dO O))    dQ = dS K    dK = dS^T Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[Sequence[int]], scale: float) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for at in _slices(lengths):
            part, lse[at] = _flash(q[at][None], k[at][None], v[at][None], 0.0, True, scale=scale)
            out.transpose(1, 2)[at] = part[0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dout, out, scale = grads[0].transpose(1, 2), out.transpose(1, 2), ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at in _slices(ctx.lengths):
            one = q[at], k[at], v[at], out[at], lse[at], dout[at]
            if one[0].shape[1] <= _SHORT and q.dtype != torch.float32:
                dq[at], dk[at], dv[at] = _short_backward(*one, scale)
            else:
                q1, k1, v1, out1, lse1, dout1 = (t[None] for t in one)
                found = _flash_backward(dout1, q1, k1, v1, out1, lse1, 0.0, True, scale=scale)
                dq[at], dk[at], dv[at] = (t[0] for t in found)
        return dq, dk, dv, None, None


def _slices(lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, slice, slice]]:
    for row, parts in enumerate(lengths):
        end = 0
        for n in parts:
            start, end = end, end + n
            yield row, slice(None), slice(start, end)


def _short_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One document: q, out, dout [heads, n, D], lse [heads, n], k and v [kv heads, n, D]. Sums in fp32."""
    (heads, n, d), groups = q.shape, k.shape[0]
    q, dout, out = (
        t.reshape(groups, -1, d) for t in (q, dout, out)
    )  # the heads of one k/v head are rows of one product
    p = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale).sub_(lse.reshape(groups, -1, 1)).exp_()
    p.view(groups, -1, n, n).tril_()
    delta = (dout.float() * out.float()).sum(-1, keepdim=True)
    ds = torch.bmm(dout, v.transpose(1, 2)).float().sub_(delta).mul_(p).mul_(scale).to(q.dtype)
    dv = torch.bmm(p.to(q.dtype).transpose(1, 2), dout)
    return torch.bmm(ds, k).view(heads, n, d), torch.bmm(ds.transpose(1, 2), q), dv


def register() -> None:
    """Make `NAME` known to transformers (once is enough)."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
