"""One AdamW step with 8-bit blockwise states, in the state layout of bitsandbytes' AdamW8bit: contract, torch,
registration.

States m and v are uint8 codes of the size of the parameter; block i of `blocksize` elements holds qmap[code] *
absmax[i] (qmap1 signed, qmap2 unsigned, both of 256 ascending values). All in fp32:

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and m, v are quantized again to the nearest code of m / max|m| over the block. Loshchilov and Hutter 2019; Dettmers et
al. 2022. Bytes per element with a 16-bit parameter and gradient: 6 read (p, g, two codes) and 4 written, plus 16/256
of absmax.
"""

import math

import torch
from torch import Tensor

from . import dispatch

_CHUNK = 1 << 22  # elements of fp32 work at a time: three buffers of 16 MiB whatever the size of the parameter


def _dequantize(code: Tensor, absmax: Tensor, qmap: Tensor, blocksize: int) -> Tensor:
    return qmap[code.int()] * absmax.repeat_interleave(blocksize)[: len(code)]


def _quantize(values: Tensor, qmap: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    blocks = torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks * torch.where(absmax > 0, 1 / absmax, 0.0).unsqueeze(1)
    code = torch.bucketize(scaled, (qmap[1:] + qmap[:-1]) * 0.5)
    return code.to(torch.uint8).view(-1)[: len(values)], absmax


def step_torch(
    param: Tensor, grad: Tensor, state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor, qmap1: Tensor,
    qmap2: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    grad_scale: float, blocksize: int,
) -> None:  # fmt: skip
    """Torch: the step in place, a few million elements at a time."""
    flat = param.view(-1)
    g_all, s1_all, s2_all = grad.reshape(-1), state1.view(-1), state2.view(-1)
    size = _CHUNK - _CHUNK % blocksize
    for start in range(0, len(flat), size):
        at = slice(start, min(start + size, len(flat)))
        blocks = slice(start // blocksize, -(-at.stop // blocksize))
        g = g_all[at].float() * grad_scale
        m = _dequantize(s1_all[at], absmax1[blocks], qmap1, blocksize).mul_(beta1).add_(g, alpha=1.0 - beta1)
        v = _dequantize(s2_all[at], absmax2[blocks], qmap2, blocksize).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        p = flat[at].float()
        if weight_decay > 0.0:
            p = p * (1.0 - lr * weight_decay)
        denominator = (v.sqrt() / math.sqrt(1.0 - beta2**step)).add_(eps)
        flat[at] = p.addcdiv(m, denominator, value=-lr / (1.0 - beta1**step)).to(param.dtype)
        s1_all[at], absmax1[blocks] = _quantize(m, qmap1, blocksize)
        s2_all[at], absmax2[blocks] = _quantize(v, qmap2, blocksize)


@torch.library.custom_op("trebuchet::adamw8bit_step", mutates_args=("param", "state1", "state2", "absmax1", "absmax2"))
def adamw8bit_step(
    param: Tensor, grad: Tensor, state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor, qmap1: Tensor,
    qmap2: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    grad_scale: float, blocksize: int, backend: str,
) -> None:  # fmt: skip
    dispatch.count("adamw8bit_step", backend)
    arguments = (
        param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2,
        lr, beta1, beta2, eps, weight_decay, step, grad_scale, blocksize,
    )  # fmt: skip
    if backend == "triton":
        from .triton_kernels import adamw8bit as kernels

        kernels.step(*arguments)
    else:
        step_torch(*arguments)


@adamw8bit_step.register_fake
def _(*_arguments):
    return None
