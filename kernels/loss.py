"""Per-token loss from hidden states (`token_loss`) or from logits (`cross_entropy`): contract, chunk loop,
registration.

With z = cap(scale (h W^T + b)), cap(x) = softcap tanh(x / softcap), p = softmax(z) and label y, per token and in fp32

    lse = log sum exp z       logp = z_y - lse       entropy = lse - sum p z
    dz  = g_logp (onehot - p) + g_lse p - g_entropy p (z - lse + entropy)
    dh  = dz W                dW = dz^T h            db = sum over tokens of dz             (dz times scale and 1 -
    (z/softcap)^2)

The logits of `chunk` tokens are the only [., V] tensor alive, and their buffer is overwritten by dz. Tokens whose label
is ignore_index are dropped before the product (on a GPU that count is the one host synchronisation of the op).

How many products: a frozen head needs two in all when only logp gets a gradient, because then dh is a row known in
the forward pass times one number per token that arrives later. Anything else recomputes the logits in the backward
pass (four products with dW), so any upstream gradient is right and nothing of size V x H is kept between the passes.

lse in fp32 holds logits of 1e4 to 5e-4; what rounding took from it is kept beside it, so that p keeps its digits.

Bytes: the statistics read each logit once, the gradient reads and writes it once: 3s per logit (s bytes each), where a
kernel that keeps the row in registers would need 2s and spills beyond 32,768 columns. Weight traffic is why chunks are
not smaller than `launch_table.token_chunk`: W is read twice per chunk, which the products hide from 512 tokens (frozen)
or 2,048 (dW too).
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import dispatch
from .loss_torch import softmax_rows


def _stats(
    z: Tensor, labels: Tensor, softcap, scale, want_entropy: bool, want_argmax: bool, backend: str
) -> tuple[Tensor, ...]:
    """logp, lse, entropy, argmax and, from the kernel, what lse lost when it was rounded (torch forms it again)."""
    if backend == "triton":
        from .triton_kernels import loss as kernels

        return kernels.stats(z, labels, softcap, scale, want_entropy, want_argmax)
    return softmax_rows(
        z, labels, softcap=softcap, logit_scale=scale, want_entropy=want_entropy, want_argmax=want_argmax
    )


def _overwrite_with_dz(z: Tensor, labels: Tensor, lse, rest, entropy, grads, softcap, scale, backend: str) -> None:
    if backend == "triton":
        from .triton_kernels import loss as kernels

        kernels.gradient(z, labels, lse, rest, entropy, grads, softcap, scale, out=z)
    else:
        softmax_rows(z, labels, softcap=softcap, logit_scale=scale, grads=grads, out=z)


def _stats_and_dz(
    z: Tensor, labels: Tensor, softcap, scale, want_entropy, want_argmax, backend: str
) -> tuple[Tensor, ...]:
    """Statistics, then z <- d logp / dz; one sweep in torch, two kernels on a GPU."""
    one = torch.ones(len(labels), dtype=torch.float32, device=z.device)
    if backend == "triton":
        stats = _stats(z, labels, softcap, scale, want_entropy, want_argmax, backend)
        _overwrite_with_dz(z, labels, stats[1], stats[4], None, (one, None, None), softcap, scale, backend)
        return stats
    return softmax_rows(
        z, labels, softcap=softcap, logit_scale=scale, want_entropy=want_entropy, want_argmax=want_argmax,
        grads=(one, None, None), out=z,
    )  # fmt: skip


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class _Kept:
    """The tokens that count, `chunk` at a time; when every token counts nothing is gathered."""

    def __init__(self, labels: Tensor, ignore_index: int, chunk: int) -> None:
        mask = labels != ignore_index
        # Fake labels have no values; what a step can need at most is asked of them, so all of them count.
        self.total = len(labels) if is_fake(labels) else int(mask.sum())
        self.index = None if self.total == len(labels) else mask.nonzero().squeeze(1)
        self.chunk = chunk

    def __iter__(self):
        for start in range(0, self.total, self.chunk):
            at = slice(start, min(start + self.chunk, self.total))
            yield at if self.index is None else self.index[at]

    def logits_buffer(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.new_empty(min(self.chunk, self.total), weight.shape[0])


@torch.library.custom_op("trebuchet::token_loss", mutates_args=())
def token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float,
    ignore_index: int, want_entropy: bool, want_argmax: bool, want_rows: bool, chunk: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, lse, entropy, argmax, the rest of lse [N] and, if want_rows, d logp / d hidden [N, H] (zero rows at ignored
    tokens)."""
    dispatch.count("token_loss", backend)
    results = _empty_results(hidden, labels, want_entropy, want_argmax, want_rows)
    kept = _Kept(labels, ignore_index, chunk)
    buffer = kept.logits_buffer(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for at in kept:
            y = labels[at]
            z = _product(hidden[at], weight, bias, buffer[: len(y)])
            if want_rows:
                stats = _stats_and_dz(z, y, softcap, logit_scale, want_entropy, want_argmax, backend)
                results[5][at] = torch.mm(z, weight)
            else:
                stats = _stats(z, y, softcap, logit_scale, want_entropy, want_argmax, backend)
            for result, stat, wanted in zip(
                results, stats, (True, True, want_entropy, want_argmax, True), strict=False
            ):
                if wanted:
                    result[at] = stat
    return results


def _empty_results(hidden: Tensor, labels: Tensor, want_entropy: bool, want_argmax: bool, want_rows: bool):
    n, dtype = len(labels), torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_zeros(n, dtype=dtype),
        hidden.new_zeros(n, dtype=dtype),
        hidden.new_zeros(n if want_entropy else 0, dtype=dtype),
        labels.new_zeros(n if want_argmax else 0),
        hidden.new_zeros(n, dtype=dtype),
        hidden.new_zeros(hidden.shape if want_rows else (0,)),
    )


@token_loss.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    softcap,
    logit_scale,
    ignore_index,
    want_entropy,
    want_argmax,
    want_rows,
    chunk,
    backend,
):
    return _empty_results(hidden, labels, want_entropy, want_argmax, want_rows)


@torch.library.custom_op("trebuchet::token_loss_backward", mutates_args=())
def token_loss_backward(
    g_logp: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    labels: Tensor, bias: Tensor | None, lse: Tensor, rest: Tensor, entropy: Tensor, softcap: float | None, logit_scale: float,
    ignore_index: int, want_dh: bool, want_dw: bool, want_db: bool, chunk: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh, dW, db (empty unless wanted) for any upstream gradients, by recomputing the logits; dW and db accumulate in
    fp32."""
    dispatch.count("token_loss_backward", backend)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dh = hidden.new_zeros(hidden.shape if want_dh else (0,))
    dw = weight.new_zeros(weight.shape if want_dw else (0,), dtype=wide)
    db = weight.new_zeros(weight.shape[0] if want_db else 0, dtype=wide)
    kept = _Kept(labels, ignore_index, chunk)
    buffer = kept.logits_buffer(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for at in kept:
            y, h = labels[at], hidden[at]
            z = _product(h, weight, bias, buffer[: len(y)])
            grads = tuple(g[at].contiguous() if g is not None else None for g in (g_logp, g_lse, g_entropy))
            entropy_at = entropy[at] if g_entropy is not None else None
            _overwrite_with_dz(z, y, lse[at], rest[at], entropy_at, grads, softcap, logit_scale, backend)
            if want_dh:
                dh[at] = torch.mm(z, weight)
            if want_dw:
                dw += torch.mm(z.t(), h)
            if want_db:
                db += z.sum(0, dtype=wide)
    return dh, dw.to(weight.dtype), db.to(weight.dtype)


@token_loss_backward.register_fake
def _(
    g_logp, g_lse, g_entropy, hidden, weight, labels, bias, lse, rest, entropy, softcap, logit_scale, ignore_index,
    want_dh, want_dw, want_db, chunk, backend,
):  # fmt: skip
    return (
        hidden.new_zeros(hidden.shape if want_dh else (0,)),
        weight.new_zeros(weight.shape if want_dw else (0,)),
        weight.new_zeros(weight.shape[0] if want_db else 0),
    )


def _setup(ctx, inputs, output):
    hidden, weight, labels, bias, ctx.softcap, ctx.scale, ctx.ignore, _, _, ctx.has_rows, ctx.chunk, ctx.backend = (
        inputs
    )
    _, lse, entropy, _, rest, rows = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, lse, rest, entropy, rows)


def _grad(ctx, g_logp, g_lse, g_entropy, _g_argmax, _g_rest, _g_rows):
    hidden, weight, labels, bias, lse, rest, entropy, rows = ctx.saved_tensors
    want_dh, want_dw = ctx.needs_input_grad[:2]
    want_db = ctx.needs_input_grad[3]
    nothing = (None,) * 8
    if g_entropy is not None and not g_entropy.numel():
        g_entropy = None  # the gradient of an output that was not asked for, made up by a tracer
    if ctx.has_rows and g_lse is None and g_entropy is None and not want_dw and not want_db:
        if g_logp is None or not want_dh:
            return None, None, None, None, *nothing
        return (rows * g_logp.unsqueeze(1)).to(hidden.dtype), None, None, None, *nothing
    dh, dw, db = token_loss_backward(
        g_logp, g_lse, g_entropy, hidden, weight, labels, bias, lse, rest, entropy, ctx.softcap, ctx.scale, ctx.ignore,
        want_dh, want_dw, want_db, ctx.chunk, ctx.backend,
    )  # fmt: skip
    return dh if want_dh else None, dw if want_dw else None, None, db if want_db else None, *nothing


token_loss.register_autograd(_grad, setup_context=_setup)
