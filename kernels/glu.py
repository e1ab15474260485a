"""Gated activations h = act(e) g (SwiGLU, GeGLU exact and tanh): contract, torch implementation, registration.

    silu:  act(e) = e sigma(e)          act'(e) = sigma(e) (1 + e (1 - sigma(e)))
    gelu:  act(e) = e Phi(e)            act'(e) = Phi(e) + e phi(e)                          (approximate="none")
    tanh:  act(e) = e (1 + t) / 2       act'(e) = (1 + t) / 2 + e (1 - t^2) u' / 2,          t = tanh u,
           u = sqrt(2/pi) (e + 0.044715 e^3), u' = sqrt(2/pi) (1 + 3 * 0.044715 e^2)
    de = dh g act'(e)                   dg = dh act(e)

Nothing but e and g is kept for the backward pass: act(e) and h are formed again from registers.
Bytes per element, s bytes each: forward 3s, backward 5s (6s when h is asked for, which the LoRA MLP needs for its down
projection). That is the minimum: each input once, each output once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def act_forward(e: Tensor, activation: str) -> Tensor:
    """Torch: act(e), in the dtype of e."""
    if activation == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if activation == "gelu_tanh" else "none")


def act_backward(d: Tensor, e: Tensor, activation: str) -> Tensor:
    """Torch: d act'(e)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(d, e)
    return torch.ops.aten.gelu_backward(d, e, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.library.custom_op("trebuchet::glu", mutates_args=())
def glu(e: Tensor, g: Tensor, activation: str, backend: str) -> Tensor:
    dispatch.count("swiglu" if activation == "silu" else "geglu", backend)
    if backend == "triton":
        from .triton_kernels import glu as kernels

        return kernels.forward(e, g, activation)
    return act_forward(e, activation).mul_(g).contiguous()


@glu.register_fake
def _(e, g, activation, backend):
    return e.new_empty(e.shape)


@torch.library.custom_op("trebuchet::glu_backward", mutates_args=())
def glu_backward(
    dh: Tensor, e: Tensor, g: Tensor, activation: str, want_h: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count("swiglu_backward" if activation == "silu" else "geglu_backward", backend)
    if backend == "triton":
        from .triton_kernels import glu as kernels

        return kernels.backward(dh, e, g, activation, want_h)
    a = act_forward(e, activation)
    h = (a * g).contiguous() if want_h else e.new_empty(0)
    de = act_backward(dh * g, e, activation).contiguous()
    return de, a.mul_(dh).contiguous(), h


@glu_backward.register_fake
def _(dh, e, g, activation, want_h, backend):
    return e.new_empty(e.shape), e.new_empty(e.shape), e.new_empty(e.shape if want_h else 0)


def _setup(ctx, inputs, output):
    e, g, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(e, g)


def _grad(ctx, dh):
    e, g = ctx.saved_tensors
    de, dg, _ = glu_backward(dh, e, g, ctx.activation, False, ctx.backend)
    return de, dg, None, None


glu.register_autograd(_grad, setup_context=_setup)
