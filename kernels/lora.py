"""Linear layers with LoRA on a dense or NF4 base, alone, several on one input (q, k, v), or as a gated MLP.

    y  = x W^T + b + s (x_l A^T) B^T          W [out, in], A [r, in], B [out, r]; x_l is x, or x after dropout
    t  = s dy B [N, r]        dx = dy W + t A        dA = t^T x_l        dB = s dy^T (x_l A^T)
    dW = dy^T x               db = sum dy
    MLP: h = act(e) g with e, g from x; dh as dx with down's weights, then de, dg (see `glu`), then dx over both

The matrix products are the vendor library's (torch.mm). What this adds to autograd over three modules: dy B is formed
once and x A^T is kept, x is kept once for all projections, dx accumulates into one buffer, h is not kept but formed
again, and an NF4 base is dequantized again in the backward pass, one weight at a time, so none outlives its use. A
frozen base gets no gradient. Everything the backward pass reads goes through save_for_backward, so saved-tensor hooks
(offloading, checkpointing) see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch
from .glu import glu, glu_backward
from .nf4 import NF4Weight, nf4_dequantize


@dataclass(frozen=True, kw_only=True)
class LoraLinear:
    """One projection. A and B None: the base alone. `x_lora`: input of the adapter when it differs from x (dropout)."""

    weight: Tensor | NF4Weight
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    x_lora: Tensor | None = None


# Per projection, in the integer list of the op's schema: is it NF4, is that nested, has it LoRA, bias, x_lora; out, in;
# block sizes.
_FIELDS = 9


def pack(projections: Sequence[LoraLinear]) -> tuple[list[Tensor], list[int], list[float]]:
    """Projections as the flat lists that a torch.library schema can carry."""
    tensors: list[Tensor] = []
    spec: list[int] = []
    for p in projections:
        nf4 = p.weight if isinstance(p.weight, NF4Weight) else None
        tensors += nf4.tensors() if nf4 else [p.weight]  # type: ignore[list-item]
        tensors += [t for t in (p.A, p.B, p.bias, p.x_lora) if t is not None]
        nested = nf4 is not None and nf4.code2 is not None
        flags = [nf4 is not None, nested, p.A is not None, p.bias is not None, p.x_lora is not None]
        spec += [*map(int, flags), *p.weight.shape, *((nf4.blocksize, nf4.blocksize2) if nf4 else (0, 0))]
    return tensors, spec, [p.scaling for p in projections]


class _Unpacked:
    """One projection read back from the flat lists; `slot` says where in the tensor list a gradient belongs."""

    def __init__(self, tensors: Sequence[Tensor], at: int, spec: Sequence[int], scaling: float) -> None:
        is_nf4, nested, has_lora, has_bias, has_x, self.out, self.inner, self.blocksize, self.blocksize2 = spec
        self.scaling, self.slot = scaling, {}
        names = ["packed", "absmax", "code"] + ["code2", "absmax2", "offset"] * nested if is_nf4 else ["W"]
        names += ["A", "B"] * has_lora + ["bias"] * has_bias + ["x_lora"] * has_x
        for i, name in enumerate(names):
            self.slot[name] = at + i
        self.tensors, self.end = tensors, at + len(names)

    def get(self, name: str) -> Tensor | None:
        return self.tensors[self.slot[name]] if name in self.slot else None

    def weight(self, dtype: torch.dtype, backend: str) -> Tensor:
        if "W" in self.slot:
            return self.tensors[self.slot["W"]].to(dtype)
        part = self.get
        return nf4_dequantize(
            part("packed"), part("absmax"), part("code"), part("code2"), part("absmax2"), part("offset"),
            (self.out, self.inner), dtype, self.blocksize, self.blocksize2, backend,
        )  # fmt: skip

    def forward(self, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """y [N, out], and x_l A^T [N, r] ([N, 0] without an adapter)."""
        bias = self.get("bias")
        y = torch.nn.functional.linear(x, self.weight(x.dtype, backend), None if bias is None else bias.to(x.dtype))
        A, B, x_lora = self.get("A"), self.get("B"), self.get("x_lora")
        if A is None or B is None:
            return y, x.new_empty(x.shape[0], 0)
        xa = torch.mm(x if x_lora is None else x_lora, A.to(x.dtype).t())
        return y.addmm_(xa, B.to(x.dtype).t(), alpha=self.scaling), xa

    def adapter_grad(self, dy: Tensor) -> Tensor | None:
        """t = s dy B [N, r], which every other gradient of the adapter is made from; None without an adapter."""
        B = self.get("B")
        return None if B is None else torch.mm(dy, B.to(dy.dtype)).mul_(self.scaling)

    def input_grad(self, dy: Tensor, t: Tensor | None, dx: Tensor | None, backend: str) -> Tensor:
        """dy W + t A, added into dx when one is given; without the adapter's part when that has its own input."""
        weight = self.weight(dy.dtype, backend)
        dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        if t is not None and "x_lora" not in self.slot:
            dx.addmm_(t, self.tensors[self.slot["A"]].to(dy.dtype))
        return dx

    def weight_grads(
        self, dy: Tensor, t: Tensor | None, x: Tensor, xa: Tensor, needs: Sequence[bool], grads: list[Tensor | None]
    ) -> None:
        """Fill `grads` at the slots of A, B, x_lora, W and bias that need one."""
        for name, slot in self.slot.items():
            if not needs[slot]:
                continue
            if name == "A":
                x_lora = self.get("x_lora")
                assert t is not None  # no A without B
                grad = torch.mm(t.t(), x if x_lora is None else x_lora)
            elif name == "B":
                grad = torch.mm(dy.t(), xa).mul_(self.scaling)
            elif name == "x_lora":
                assert t is not None
                grad = torch.mm(t, self.tensors[self.slot["A"]].to(dy.dtype))
            elif name == "W":
                grad = torch.mm(dy.t(), x)
            else:
                grad = dy.sum(0)
            grads[slot] = grad.to(self.tensors[slot].dtype)


def _unpack(tensors: Sequence[Tensor], spec: Sequence[int], scalings: Sequence[float]) -> list[_Unpacked]:
    found: list[_Unpacked] = []
    for i, scaling in enumerate(scalings):
        at = found[-1].end if found else 0
        found.append(_Unpacked(tensors, at, spec[i * _FIELDS : (i + 1) * _FIELDS], scaling))
    return found


# --- projections of one input -----------------------------------------------------------------------------------------


@torch.library.custom_op("trebuchet::lora_project", mutates_args=())
def lora_project(
    x: Tensor, tensors: Sequence[Tensor], spec: Sequence[int], scalings: Sequence[float], backend: str
) -> list[Tensor]:
    """x [N, in] -> every y [N, out_i], then every x_l A^T [N, r_i]."""
    dispatch.count("lora_project", backend)
    with torch.autocast(x.device.type, enabled=False):
        pairs = [p.forward(x, backend) for p in _unpack(tensors, spec, scalings)]
    return [y for y, _ in pairs] + [xa for _, xa in pairs]


def _ranks(parts: Sequence[_Unpacked]) -> list[int]:
    found = [p.get("A") for p in parts]
    return [0 if A is None else A.shape[0] for A in found]


@lora_project.register_fake
def _(x, tensors, spec, scalings, backend):
    parts = _unpack(tensors, spec, scalings)
    return [x.new_empty(x.shape[0], p.out) for p in parts] + [x.new_empty(x.shape[0], r) for r in _ranks(parts)]


def _project_setup(ctx, inputs, output):
    x, tensors, ctx.spec, ctx.scalings, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.count = len(tensors)
    ctx.save_for_backward(x, *tensors, *output[len(ctx.scalings) :])


def _project_grad(ctx, grads):
    x, *rest = ctx.saved_tensors
    tensors, xas = rest[: ctx.count], rest[ctx.count :]
    want_dx, needs = ctx.needs_input_grad[:2]
    out: list[Tensor | None] = [None] * ctx.count
    dx = None
    with torch.autocast(x.device.type, enabled=False):
        for p, dy, xa in zip(_unpack(tensors, ctx.spec, ctx.scalings), grads, xas, strict=False):
            if dy is not None:
                t = p.adapter_grad(dy)
                dx = p.input_grad(dy, t, dx, ctx.backend) if want_dx else None
                p.weight_grads(dy, t, x, xa, needs, out)
    return dx, out, None, None, None


lora_project.register_autograd(_project_grad, setup_context=_project_setup)


# --- gated MLP --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("trebuchet::lora_mlp", mutates_args=())
def lora_mlp(
    x: Tensor, tensors: Sequence[Tensor], spec: Sequence[int], scalings: Sequence[float], activation: str, backend: str
) -> list[Tensor]:
    """x [N, H] -> y [N, H]; then, for the backward pass, e, g [N, F] and the three x A^T."""
    dispatch.count("lora_mlp", backend)
    gate, up, down = _unpack(tensors, spec, scalings)
    with torch.autocast(x.device.type, enabled=False):
        (e, xa_gate), (g, xa_up) = gate.forward(x, backend), up.forward(x, backend)
        y, xa_down = down.forward(glu(e, g, activation, backend), backend)
    return [y, e, g, xa_gate, xa_up, xa_down]


@lora_mlp.register_fake
def _(x, tensors, spec, scalings, activation, backend):
    parts = _unpack(tensors, spec, scalings)
    widths = [parts[2].out, parts[0].out, parts[1].out, *_ranks(parts)]
    return [x.new_empty(x.shape[0], width) for width in widths]


def _mlp_setup(ctx, inputs, output):
    x, tensors, ctx.spec, ctx.scalings, ctx.activation, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.count = len(tensors)
    ctx.save_for_backward(x, *tensors, *output[1:])


def _mlp_grad(ctx, grads):
    x, *rest = ctx.saved_tensors
    tensors, (e, g, xa_gate, xa_up, xa_down) = rest[: ctx.count], rest[ctx.count :]
    gate, up, down = _unpack(tensors, ctx.spec, ctx.scalings)
    want_dx, needs = ctx.needs_input_grad[:2]
    out: list[Tensor | None] = [None] * ctx.count
    with torch.autocast(x.device.type, enabled=False):
        dy = grads[0]
        if dy is None:
            return None, out, None, None, None, None
        t = down.adapter_grad(dy)
        dh = down.input_grad(dy, t, None, ctx.backend)
        want_h = any(needs[down.slot[n]] for n in ("A", "W") if n in down.slot)
        de, dg, h = glu_backward(dh, e, g, ctx.activation, want_h, ctx.backend)
        del dh
        down.weight_grads(dy, t, h, xa_down, needs, out)
        del h, t
        t_gate, t_up, dx = gate.adapter_grad(de), up.adapter_grad(dg), None
        if want_dx:
            dx = gate.input_grad(de, t_gate, None, ctx.backend)
            dx = up.input_grad(dg, t_up, dx, ctx.backend)
        gate.weight_grads(de, t_gate, x, xa_gate, needs, out)
        up.weight_grads(dg, t_up, x, xa_up, needs, out)
    return dx, out, None, None, None, None


lora_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)
