"""Rotary position embedding of q and k in one op: contract, torch implementation, registration.

Half-split ("rotate half") convention of transformers: with a, b the two halves of the rotary channels and angles c, s,

    (a, b) -> (a c - b s, b c + a s)

The map is a rotation, so the backward pass is the same op with s -> -s. Positions are explicit: cos and sin are either
already gathered per token or a table indexed by `positions`; packed, padded and plain sequences are then the same case.
Channels past the rotary width (partial rotary) pass through.

Bytes per element of q and k, s bytes each: 2s, the minimum, plus cos and sin once per token.
"""

import torch
from torch import Tensor

from . import dispatch


def rotate(x: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """Torch: x [B, heads, T, D] any strides; cos, sin [B|1, T, R], R <= D. Same strides out when x is dense."""
    half = cos.shape[-1] // 2
    wide = torch.promote_types(x.dtype, cos.dtype)
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    a, b = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x)
    sign = -1.0 if conjugate else 1.0
    if wide == x.dtype:
        torch.mul(a, c, out=out[..., :half]).addcmul_(b, s, value=-sign)
        torch.mul(b, c, out=out[..., half : 2 * half]).addcmul_(a, s, value=sign)
    else:
        out[..., :half] = a.to(wide) * c - sign * (b.to(wide) * s)
        out[..., half : 2 * half] = b.to(wide) * c + sign * (a.to(wide) * s)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


@torch.library.custom_op("trebuchet::rope", mutates_args=())
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dispatch.count("rope_backward" if conjugate else "rope", backend)
    if backend == "triton":
        from .triton_kernels import rope as kernels

        return kernels.launch(q, k, cos, sin, positions, conjugate)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return rotate(q, cos, sin, conjugate), rotate(k, cos, sin, conjugate)


@rope.register_fake
def _(q, k, cos, sin, positions, conjugate, backend):
    return torch.empty_like(q), torch.empty_like(k)


def _setup(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.conjugate, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _grad(ctx, dq, dk):
    cos, sin, positions = ctx.saved_tensors
    dq, dk = rope(dq, dk, cos, sin, positions, not ctx.conjugate, ctx.backend)
    return dq, dk, None, None, None, None, None


rope.register_autograd(_grad, setup_context=_setup)
