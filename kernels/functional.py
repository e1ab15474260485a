"""The only door to the kernel layer: functions of plain local tensors with torch-like signatures, each differentiable.

Every function is one op registered with torch.library (schema, fake, autograd) that runs as a Triton kernel on CUDA and
ROCm and as plain torch elsewhere; `force_backend` overrides that, `calls` says what ran. Inputs are never written to
(adamw8bit_step excepted), outputs never alias inputs, and what the backward pass needs goes through save_for_backward.
A tensor here is local and whole: gathering shards is done by the module that owns the weights. Leaves out attention and
the matrix products themselves, which are torch's.

Autocast: ops with matrix products (token_loss, lora_*) cast their inputs as torch.nn.Linear would; the others compute
in fp32 inside and return what transformers' module returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import adamw8bit as _adamw8bit
from . import cross_entropy as _cross_entropy
from . import glu as _glu
from . import lora as _lora
from . import loss as _loss
from . import nf4 as _nf4
from . import norms as _norms
from . import rope as _rope
from .checks import as_linear, check_norm, describe
from .dispatch import KernelUnavailable, calls, choose, force_backend, reset_calls
from .launch_table import launch_table_hash, token_chunk
from .lora import LoraLinear
from .nf4 import NF4Weight

__all__ = [
    "KernelUnavailable",
    "LoraLinear",
    "NF4Weight",
    "TokenLoss",
    "adamw8bit_step",
    "add_rms_norm",
    "calls",
    "cross_entropy",
    "force_backend",
    "geglu",
    "launch_table_hash",
    "layer_norm",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "nf4_dequantize",
    "reset_calls",
    "rms_norm",
    "rope",
    "swiglu",
    "token_loss",
]

_GELU = {"tanh": "gelu_tanh", "none": "gelu"}


class TokenLoss(NamedTuple):
    """Per token, fp32 (argmax int64), in the shape of the labels; 0 where the label is ignored."""

    logp: Tensor  # log-probability of the label
    lse: Tensor  # log of the softmax denominator
    entropy: Tensor | None  # nats
    argmax: Tensor | None  # most probable token


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019): x rsqrt(mean x^2 + eps) (weight + offset).

    x [..., H], weight [H]. casting "llama" rounds the normalized x to its dtype before the weight (result: promotion
    of both dtypes), "gemma" multiplies in fp32 and rounds once (result: dtype of x; Gemma's weight also has offset
    1).
    """
    check_norm("rms_norm", x, weight, casting)
    backend = choose("rms_norm", x, weight)
    return _norms.rms_norm(x, weight, eps, offset, casting, backend)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to the dtype of x: a block's residual add and the next norm in one
    pass.

    x and residual [..., H] of one dtype and shape. The two gradients are equal and share one tensor.
    """
    check_norm("add_rms_norm", x, weight, casting)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: residual {describe(residual)} must be like x {describe(x)}")
    backend = choose("add_rms_norm", x, residual, weight)
    return _norms.add_rms_norm(x, residual, weight, eps, offset, casting, backend)[:2]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.layer_norm over the last dimension, fp32 inside. x [..., H], weight and bias [H]; dtype of
    x."""
    check_norm("layer_norm", x, weight, "llama")
    backend = choose("layer_norm", x, weight, bias)
    return _norms.layer_norm(x, weight, bias, eps, backend)[0]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotate q [B, Hq, T, D] and k [B, Hk, T, D] (any strides, kept) by the angles of each token (Su et al. 2021).

    positions None: cos and sin are [B or 1, T, R], already gathered. Otherwise they are a table [P, R] and positions
    int [B, T]. R <= D is the rotary width; both halves of R hold the same angles, as in transformers, and only the
    first is read.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q {describe(q)} and k {describe(k)} must be [B, heads, T, D] with the same B, T and D")
    wanted = 3 if positions is None else 2
    if cos.dim() != wanted or cos.shape != sin.shape or cos.shape[-1] > q.shape[-1] or cos.shape[-1] % 2:
        raise ValueError(
            f"rope: cos {describe(cos)} and sin {describe(sin)} must be {wanted}-dimensional, even and at most {q.shape[-1]} wide"
        )
    if positions is None and (cos.shape[1] != q.shape[2] or cos.shape[0] not in (1, q.shape[0])):
        raise ValueError(f"rope: cos {describe(cos)} does not fit {q.shape[0]} x {q.shape[2]} tokens")
    backend = choose("rope", q, k, cos)
    return _rope.rope(q, k, cos, sin, positions, False, backend)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Same shape and dtype, rows may be strided; contiguous result."""
    return _gated("swiglu", gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up with the tanh approximation or exact ("none"), as torch.nn.functional.gelu."""
    if approximate not in _GELU:
        raise ValueError(f"geglu: approximate is {approximate!r}; it must be 'tanh' or 'none'")
    return _gated("geglu", gate, up, _GELU[approximate])


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_argmax: bool = False,
    chunk: int | None = None,
) -> TokenLoss:
    """Log-probability of each label under softmax(cap(logit_scale * (hidden weight^T + bias))), without keeping the
    logits.

    hidden [..., H]; weight [V, H]; labels int64 of hidden's leading shape, aligned (no shift inside), ignore_index
    where a token does not count. cap(x) = softcap tanh(x / softcap). Differentiable in logp, lse and entropy with any
    upstream gradient; SFT is -logp.sum() / count, DPO and its kin sum logp per sequence. A weight that does not
    require a gradient gets none computed, and then two products suffice in all as long as only logp is used. `chunk`
    is the tokens whose logits are alive at once (default: the launch table). hidden is cast to the dtype of weight.
    """
    if hidden.shape[:-1] != labels.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"token_loss: hidden {describe(hidden)}, weight {describe(weight)} and labels {describe(labels)} do not fit together"
        )
    hidden, weight, bias = as_linear(hidden, weight, bias)
    backend = choose("token_loss", hidden, weight)
    train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    learning = torch.is_grad_enabled()
    rows = learning and hidden.requires_grad and not train_head
    logp, lse, entropy, argmax, _, _ = _loss.token_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias, softcap, logit_scale, ignore_index,
        return_entropy, return_argmax, rows, chunk or token_chunk(hidden.device.type, trained=learning and train_head),
        backend,
    )  # fmt: skip
    shape = labels.shape
    return TokenLoss(
        logp.view(shape),
        lse.view(shape),
        entropy.view(shape) if return_entropy else None,
        argmax.view(shape) if return_argmax else None,
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(loss, lse) per row, fp32, in the shape of labels; 0 where ignored. logits [..., V] up to 262,144 wide, labels
    int64.

    The reduction is the caller's: both results carry any upstream gradient, and the gradient is written once.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"cross_entropy: logits {describe(logits)} and labels {describe(labels)} do not fit together")
    backend = choose("cross_entropy", logits)
    flat = logits.reshape(-1, logits.shape[-1])
    loss, lse, _ = _cross_entropy.cross_entropy(flat, labels.reshape(-1), ignore_index, softcap, logit_scale, backend)
    return loss.view(labels.shape), lse.view(labels.shape)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [weight.shape] in `dtype` (default: weight.dtype), bit for bit what bitsandbytes gives; no
    gradient."""
    w = weight
    backend = choose("nf4_dequantize", w.packed, w.code)
    return _nf4.nf4_dequantize(
        w.packed,
        w.absmax,
        w.code,
        w.code2,
        w.absmax2,
        w.offset,
        w.shape,
        dtype or w.dtype,
        w.blocksize,
        w.blocksize2,
        backend,
    )


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    bias: Tensor | None = None,
    x_lora: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias + scaling (x_lora A^T) B^T (Hu et al. 2021). x [..., in], weight [out, in], A [r, in], B [out,
    r].

    x_lora (default x) is the adapter's input where dropout changed it. A and B may be None (adapters off). Computes
    in the dtype of x (autocast's, if on); gradients come back in each tensor's own dtype. Dense weights that require
    it get one too.
    """
    return _project(x, [LoraLinear(weight=weight, A=A, B=B, scaling=scaling, bias=bias, x_lora=x_lora)])[0]


def lora_qkv(x: Tensor, *projections: LoraLinear) -> tuple[Tensor, ...]:
    """Several LoRA projections of one x [..., in] (q, k and v, or gate and up), whose input gradient accumulates in one
    buffer."""
    return _project(x, projections)


def lora_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear, *, activation: str = "silu") -> Tensor:
    """down(act(gate(x)) * up(x)) with LoRA on any of the three; activation "silu", "gelu" or "gelu_tanh". x [..., H].

    Keeps x, gate(x) and up(x) for the backward pass, not their product. Dropout must be zero (x_lora is not taken
    here).
    """
    if activation not in _glu.ACTIVATIONS:
        raise ValueError(f"lora_mlp: activation is {activation!r}; it must be one of {', '.join(_glu.ACTIVATIONS)}")
    if any(p.x_lora is not None for p in (gate, up, down)):
        raise ValueError("lora_mlp: x_lora is not supported; with adapter dropout call lora_linear three times")
    x = as_linear(x)[0]
    tensors, spec, scalings = _lora.pack((gate, up, down))
    backend = choose("lora_mlp", x)
    flat = x.reshape(-1, x.shape[-1])
    return _lora.lora_mlp(flat, tensors, spec, scalings, activation, backend)[0].view(
        *x.shape[:-1], down.weight.shape[0]
    )


def adamw8bit_step(
    param: Tensor, grad: Tensor, state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor, qmap1: Tensor,
    qmap2: Tensor, *, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0, step: int, grad_scale: float = 1.0, blocksize: int = 256,
) -> None:  # fmt: skip
    """One AdamW step in place on param, states and absmaxes, with the state layout of bitsandbytes' AdamW8bit.

    param and grad of one shape; state1, state2 uint8 of that shape; absmax1, absmax2 fp32 [ceil(numel / blocksize)];
    qmap1 (signed), qmap2 (unsigned) fp32 [256], ascending. `step` counts from 1; grad is multiplied by grad_scale.
    """
    if not param.is_contiguous() or not state1.is_contiguous() or not state2.is_contiguous():
        raise ValueError("adamw8bit_step: param, state1 and state2 must be contiguous, they are updated in place")
    backend = choose("adamw8bit_step", param, grad)
    _adamw8bit.adamw8bit_step(
        param.detach(), grad.detach(), state1, state2, absmax1, absmax2, qmap1, qmap2,
        lr, beta1, beta2, eps, weight_decay, step, grad_scale, blocksize, backend,
    )  # fmt: skip


def _project(x: Tensor, projections) -> tuple[Tensor, ...]:
    x = as_linear(x)[0]
    for p in projections:
        if p.weight.shape[1] != x.shape[-1]:
            raise ValueError(f"lora: a weight of shape {tuple(p.weight.shape)} does not fit x {describe(x)}")
    tensors, spec, scalings = _lora.pack([_flat_input(p, x) for p in projections])
    flat = x.reshape(-1, x.shape[-1])
    outputs = _lora.lora_project(flat, tensors, spec, scalings, choose("lora_project", x))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(scalings)])


def _flat_input(p: LoraLinear, x: Tensor) -> LoraLinear:
    if p.x_lora is None:
        return p
    given = p.x_lora.to(x.dtype).reshape(-1, x.shape[-1])
    return LoraLinear(weight=p.weight, A=p.A, B=p.B, scaling=p.scaling, bias=p.bias, x_lora=given)


def _gated(op: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{op}: gate {describe(gate)} and up {describe(up)} must have one shape and dtype")
    return _glu.glu(gate, up, activation, choose(op, gate))
