"""Cross entropy on given logits, per row: contract and registration. The arithmetic is `loss`'s.

For logits that exist anyway (evaluation, classifiers). A language-model head should use `token_loss`, which never
forms them. loss = lse - z_y and lse per row in fp32, 0 at ignored rows; dlogits = g_loss (p - onehot) + g_lse p,
written once. Bytes per logit, s bytes each: forward s, backward 2s (the minimum for a row that does not fit in
registers).
"""

import torch
from torch import Tensor

from . import dispatch
from .loss_torch import softmax_rows


def _safe(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels with ignored ones replaced by 0, and the mask of those that count."""
    valid = labels != ignore_index
    return torch.where(valid, labels, 0), valid


@torch.library.custom_op("trebuchet::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float | None, logit_scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and what lse lost when it was rounded, [N] in fp32, from logits [N, V] and labels [N]."""
    dispatch.count("cross_entropy", backend)
    y, valid = _safe(labels, ignore_index)
    if backend == "triton":
        from .triton_kernels import loss as kernels

        logp, lse, _, _, rest = kernels.stats(logits, y, softcap, logit_scale, False, False)
    else:
        logp, lse, _, _ = softmax_rows(logits, y, softcap=softcap, logit_scale=logit_scale)
        rest = torch.zeros_like(lse)  # the backward pass forms the softmax again
    return torch.where(valid, -logp, 0.0), torch.where(valid, lse, 0.0), rest


@cross_entropy.register_fake
def _(logits, labels, ignore_index, softcap, logit_scale, backend):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, lse, rest = (logits.new_empty(len(labels), dtype=dtype) for _ in range(3))
    return loss, lse, rest


@torch.library.custom_op("trebuchet::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    g_loss: Tensor | None, g_lse: Tensor | None, logits: Tensor, labels: Tensor, lse: Tensor, rest: Tensor,
    ignore_index: int,    softcap: float | None, logit_scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """dlogits [N, V], contiguous, in the dtype of logits; zero rows where the label is ignored."""
    dispatch.count("cross_entropy_backward", backend)
    y, valid = _safe(labels, ignore_index)
    out = logits.new_empty(logits.shape)
    g_logp = torch.where(valid, -g_loss, 0.0) if g_loss is not None else None
    grads = (g_logp, torch.where(valid, g_lse, 0.0) if g_lse is not None else None, None)
    if backend == "triton":
        from .triton_kernels import loss as kernels

        kernels.gradient(logits, y, lse, rest, None, grads, softcap, logit_scale, out=out)
    else:
        softmax_rows(logits, y, softcap=softcap, logit_scale=logit_scale, grads=grads, out=out)
    return out


@cross_entropy_backward.register_fake
def _(g_loss, g_lse, logits, labels, lse, rest, ignore_index, softcap, logit_scale, backend):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output):
    logits, labels, ctx.ignore, ctx.softcap, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, output[1], output[2])


def _grad(ctx, g_loss, g_lse, _g_rest):
    if g_loss is None and g_lse is None:
        return (None,) * 6
    logits, labels, lse, rest = ctx.saved_tensors
    dlogits = cross_entropy_backward(
        g_loss, g_lse, logits, labels, lse, rest, ctx.ignore, ctx.softcap, ctx.scale, ctx.backend
    )
    return dlogits, None, None, None, None, None


cross_entropy.register_autograd(_grad, setup_context=_setup)
