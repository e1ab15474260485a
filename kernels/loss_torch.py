"""Softmax statistics and gradients of logit rows in plain torch: what `loss` runs on a CPU, and the oracle of its
kernels.

Leaves out the matrix products and the chunking (`loss`). Rows are taken a few at a time into one fp32 buffer that stays
in the cache: on a 2-core Zen 4 (AVX-512) at vocabulary 49,152 that costs 0.5 ns per logit, against 3.3 ns for one bf16
matrix product of hidden size 576, while the same steps on the whole [512, 49152] chunk cost three times as much in page
faults (measured).
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

# Elements of the fp32 work buffer. 2^20 is 21 rows of 49,152 logits, two buffers of 4 MiB: measured flat from 2^19 to
# 2^21.
_BLOCK = 1 << 20

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    want_entropy: bool = False,
    want_argmax: bool = False,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    out: Tensor | None = None,
) -> Stats:
    """Statistics of z = cap(logit_scale * logits) per row, and optionally the gradient with respect to `logits`.

    logits [C, V] float; labels [C] int64 in [0, V). Returns logp, lse (fp32, or fp64 for fp64 logits), entropy and
    argmax [C] (empty unless wanted). With `grads`, the upstream gradients of (logp, lse, entropy), writes

        dlogits = (g_logp (onehot - p) + g_lse p - g_entropy p (z - lse + entropy)) * dz/dlogits

    into `out` [C, V], which may be `logits` itself.
    """
    rows, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, lse = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)
    g_entropy = grads[2] if grads is not None else None
    entropy = logits.new_empty(rows if want_entropy else 0, dtype=dtype)
    argmax = labels.new_empty(rows if want_argmax else 0)
    if is_fake(logits):  # no values to work on, and the two buffers below are a few MiB
        return logp, lse, entropy, argmax
    step = max(1, min(rows, _BLOCK // max(vocab, 1)))
    work, probs = logits.new_empty(step, vocab, dtype=dtype), logits.new_empty(step, vocab, dtype=dtype)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        y = labels[block].unsqueeze(1)
        z, p = work[: len(y)], probs[: len(y)]
        _capped(z.copy_(logits[block]), softcap, logit_scale)
        torch.softmax(z, -1, out=p)
        # torch's softmax adds one SIMD lane after another: without AVX-512 its denominator is off by 5e-5 at 262,144
        # columns (measured). torch's sum adds in pairs, so p is divided by what it really sums to. p at the maximum is
        # 1 / sum exp(z - max), never below 1 / V, so its logarithm is exact to fp32.
        total = p.sum(-1, keepdim=True)
        top, log_sum = z.amax(-1, keepdim=True), (total / p.amax(-1, keepdim=True)).log_()
        lse[block] = (top + log_sum).squeeze(1)
        logp[block] = (z.gather(1, y) - top - log_sum).squeeze(1)
        if want_argmax:
            argmax[block] = z.argmax(-1)
        slope = None if softcap is None or grads is None else (z / softcap).square_().neg_().add_(1.0)
        entropy_b = None
        if want_entropy or g_entropy is not None:
            # Relative to the maximum, so that logits of 1e4 leave the entropy its digits; and 0 * -inf would be nan.
            z.sub_(top).clamp_(min=torch.finfo(dtype).min)
            entropy_b = log_sum - torch.linalg.vecdot(p, z).unsqueeze(1) / total
            if want_entropy:
                entropy[block] = entropy_b.squeeze(1)
        if grads is not None:
            assert out is not None
            g = [x[block].to(dtype).unsqueeze(1) if x is not None else None for x in grads]
            _gradient(z, p, total, y, log_sum, entropy_b, g, slope)
            if logit_scale != 1.0:
                p.mul_(logit_scale)
            out[block] = p
    return logp, lse, entropy, argmax


def _capped(z: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _gradient(
    z: Tensor,
    p: Tensor,
    total: Tensor,
    y: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    g: list[Tensor | None],
    slope: Tensor | None,
) -> None:
    """p <- the gradient with respect to the unscaled logits, the softmax being p / total; z, relative to its maximum
    with `entropy`, is used up."""
    g_logp, g_lse, g_entropy = g
    coefficient = torch.zeros_like(log_sum)
    if g_logp is not None:
        coefficient -= g_logp
    if g_lse is not None:
        coefficient += g_lse
    if g_entropy is not None:
        assert entropy is not None
        p.mul_(z.sub_(log_sum - entropy).mul_(-g_entropy / total).add_(coefficient / total))
    else:
        p.mul_(coefficient / total)
    if g_logp is not None:
        p.scatter_add_(1, y, g_logp)
    if slope is not None:
        p.mul_(slope)
