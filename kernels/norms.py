"""RMSNorm, RMSNorm with the residual add fused, and LayerNorm: contract, torch implementation, registration.

With x of width H, g = dy (w + o), rstd = (mean(x^2) + eps)^-1/2 and xhat = x rstd:

    y  = xhat (w + o)                       dx = rstd (g - xhat mean(g xhat))      dw = sum over rows of dy xhat

add_rms_norm first forms s = x + r (rounded to the dtype of x, as the residual stream is) and returns y = norm(s) and s;
its gradient dx = dr = ds + dnorm(s) is formed once. LayerNorm subtracts the mean first; with xhat = (x - mean) rstd:

    y = xhat w + b        dx = rstd (g - mean(g) - xhat mean(g xhat))        dw = sum dy xhat        db = sum dy

`casting` says where the low-precision rounding of RMSNorm happens, as in transformers: "llama" rounds xhat to the
dtype of x and then multiplies by w (result dtype: promotion of the two), "gemma" multiplies in fp32 and rounds once
(dtype of x).

Bytes per element of x, s bytes each (the minimum: each input once, each output once; w and 4-byte row statistics
aside): forward 2s (add: 4s), backward 3s (add: 4s, dx and dr being one tensor), plus H * (s + 4 * programs) for dw. Rows
wider than MAX_WIDTH do not stay in registers and are read twice, or three times with dw: forward 3s (add: 5s), backward 5s
(add: 6s), plus 2s for dw.
"""

import torch
from torch import Tensor

from . import dispatch

# A row is one block of registers. Wider ones are taken in blocks of columns (`triton_kernels.wide_norm`), because at
# 32,768 columns the backward kernels would spill (compiled for sm_80 and sm_100); at 16,384 they do not.
MAX_WIDTH = 16384
# Elements that the torch path widens to fp32 at a time: 512 KiB a buffer.
_BLOCK = 1 << 17


def rms_forward(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> tuple[Tensor, Tensor]:
    """Torch: y [..., H] and rstd [rows], fp32 inside."""
    rows, wide = x.reshape(-1, x.shape[-1]), _wide(x)
    y = rows.new_empty(rows.shape, dtype=out_dtype(x, weight, casting))
    rstd = rows.new_empty(len(rows), 1, dtype=wide)
    w = weight + offset if offset else weight
    for at in _blocks(rows):
        work = rows[at].to(wide, copy=True)
        torch.rsqrt(work.pow(2).mean(-1, keepdim=True).add_(eps), out=rstd[at])
        work.mul_(rstd[at])
        if casting == "llama":
            y[at] = work.to(x.dtype) * w
        else:
            y[at] = work * (weight.to(wide) + offset)
    return y.view(x.shape), rstd.view(-1)


def rms_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, ds: Tensor | None, offset: float, casting: str, want_dw: bool
) -> tuple[Tensor, Tensor]:
    """Torch: dx in the dtype of x (plus ds, the gradient that reaches x past the norm), dw in the dtype of weight (or empty)."""
    width, wide = x.shape[-1], _wide(x)
    rows, grads, column = x.reshape(-1, width), dy.reshape(-1, width), rstd.view(-1, 1)
    past = None if ds is None else ds.reshape(-1, width)
    w, dx = weight.to(wide) + offset, rows.new_empty(rows.shape)
    dw = weight.new_zeros(width if want_dw else 0, dtype=wide)
    for at in _blocks(rows):
        xhat = rows[at].to(wide, copy=True).mul_(column[at])
        g = grads[at].to(wide, copy=True)
        if want_dw:
            dw += (g * (xhat.to(x.dtype) if casting == "llama" else xhat)).sum(0)
        g.mul_(w)
        g.addcmul_(xhat, (g * xhat).mean(-1, keepdim=True), value=-1.0).mul_(column[at])
        if past is not None:
            g += past[at]
        dx[at] = g
    return dx.view(x.shape), dw.to(weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(rows: Tensor) -> list[slice]:
    """A few rows at a time, so that the fp32 copies stay in the cache."""
    step = max(1, _BLOCK // max(rows.shape[1], 1))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def layer_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Torch: y in the dtype of x, and mean and rstd [rows]."""
    xf = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = xf.mean(-1, keepdim=True)
    centred = xf - mean
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = centred.mul_(rstd).mul_(weight.to(xf.dtype)).add_(bias.to(xf.dtype))
    return y.to(x.dtype).contiguous(), mean.reshape(-1), rstd.reshape(-1)


def layer_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch: dx, dw, db (dw and db empty unless wanted)."""
    xf = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dyf, column = dy.to(xf.dtype), (*x.shape[:-1], 1)
    xhat = (xf - mean.reshape(column)) * rstd.reshape(column)
    g = dyf * weight.to(xf.dtype)
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.reshape(column)
    dw = db = weight.new_empty(0)
    if want_dw:
        dw = (dyf * xhat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        db = dyf.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype).contiguous(), dw, db


# --- registration -----------------------------------------------------------------------------------------------------


def out_dtype(x: Tensor, weight: Tensor, casting: str) -> torch.dtype:
    """Dtype of y: what transformers' Llama norm ("llama") or Gemma norm ("gemma") returns."""
    return torch.promote_types(x.dtype, weight.dtype) if casting == "llama" else x.dtype


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _stat(x: Tensor) -> Tensor:
    return x.new_empty(_rows(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _triton_rms_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import rms_norm, wide_norm

    dtype = out_dtype(x, weight, casting)
    if x.shape[-1] > MAX_WIDTH:
        y, s, _, rstd = wide_norm.forward(x, residual, weight, None, eps, offset, casting, dtype)
        return y, s, rstd
    return rms_norm.forward(x, residual, weight, eps, offset, casting, dtype)


@torch.library.custom_op("trebuchet::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, backend: str) -> tuple[Tensor, Tensor]:
    dispatch.count("rms_norm", backend)
    if backend == "triton":
        y, _, rstd = _triton_rms_forward(x, None, weight, eps, offset, casting)
        return y, rstd
    return rms_forward(x, weight, eps, offset, casting)


@rms_norm.register_fake
def _(x, weight, eps, offset, casting, backend):
    return x.new_empty(x.shape, dtype=out_dtype(x, weight, casting)), _stat(x)


@torch.library.custom_op("trebuchet::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count("add_rms_norm", backend)
    if backend == "triton":
        return _triton_rms_forward(x, residual, weight, eps, offset, casting)
    s = (x + residual).contiguous()
    y, rstd = rms_forward(s, weight, eps, offset, casting)
    return y, s, rstd


@add_rms_norm.register_fake
def _(x, residual, weight, eps, offset, casting, backend):
    return x.new_empty(x.shape, dtype=out_dtype(x, weight, casting)), x.new_empty(x.shape), _stat(x)


@torch.library.custom_op("trebuchet::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    ds: Tensor | None,
    offset: float,
    casting: str,
    want_dw: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dispatch.count("rms_norm_backward" if ds is None else "add_rms_norm_backward", backend)
    if backend == "triton":
        from .triton_kernels import rms_norm, wide_norm

        if x.shape[-1] > MAX_WIDTH:
            return wide_norm.backward(dy, x, weight, None, rstd, ds, offset, casting, want_dw)[:2]
        return rms_norm.backward(dy, x, weight, rstd, ds, offset, casting, want_dw)
    return rms_backward(dy, x, weight, rstd, ds, offset, casting, want_dw)


@rms_norm_backward.register_fake
def _(dy, x, weight, rstd, ds, offset, casting, want_dw, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if want_dw else 0)


@torch.library.custom_op("trebuchet::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count("layer_norm", backend)
    if backend == "triton":
        from .triton_kernels import layer_norm as kernels
        from .triton_kernels import wide_norm

        if x.shape[-1] > MAX_WIDTH:
            y, _, mean, rstd = wide_norm.forward(x, None, weight, bias, eps, 0.0, "gemma", x.dtype)
            return y, mean, rstd
        return kernels.forward(x, weight, bias, eps)
    return layer_forward(x, weight, bias, eps)


@layer_norm.register_fake
def _(x, weight, bias, eps, backend):
    return x.new_empty(x.shape), _stat(x), _stat(x)


@torch.library.custom_op("trebuchet::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, want_dw: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.count("layer_norm_backward", backend)
    if backend == "triton":
        from .triton_kernels import layer_norm as kernels
        from .triton_kernels import wide_norm

        if x.shape[-1] > MAX_WIDTH:
            return wide_norm.backward(dy, x, weight, mean, rstd, None, 0.0, "gemma", want_dw)
        return kernels.backward(dy, x, weight, mean, rstd, want_dw)
    return layer_backward(dy, x, weight, mean, rstd, want_dw)


@layer_norm_backward.register_fake
def _(dy, x, weight, mean, rstd, want_dw, backend):
    shape = weight.shape if want_dw else (0,)
    return x.new_empty(x.shape), weight.new_empty(shape), weight.new_empty(shape)


def _rms_setup(ctx, inputs, output):
    x, weight, _, ctx.offset, ctx.casting, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _rms_grad(ctx, dy, _drstd):
    x, weight, rstd = ctx.saved_tensors
    want_dw = ctx.needs_input_grad[1]
    dx, dw = rms_norm_backward(dy, x, weight, rstd, None, ctx.offset, ctx.casting, want_dw, ctx.backend)
    return dx, dw if want_dw else None, None, None, None, None


def _add_rms_setup(ctx, inputs, output):
    _, _, weight, _, ctx.offset, ctx.casting, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _add_rms_grad(ctx, dy, ds, _drstd):
    s, weight, rstd = ctx.saved_tensors
    want_dw = ctx.needs_input_grad[2]
    dx, dw = rms_norm_backward(dy, s, weight, rstd, ds, ctx.offset, ctx.casting, want_dw, ctx.backend)
    return dx, dx, dw if want_dw else None, None, None, None, None


def _layer_setup(ctx, inputs, output):
    x, weight, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])


def _layer_grad(ctx, dy, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    want_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = layer_norm_backward(dy, x, weight, mean, rstd, want_dw, ctx.backend)
    return dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None, None, None


rms_norm.register_autograd(_rms_grad, setup_context=_rms_setup)
add_rms_norm.register_autograd(_add_rms_grad, setup_context=_add_rms_setup)
layer_norm.register_autograd(_layer_grad, setup_context=_layer_setup)
