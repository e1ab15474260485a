"""Values and every gradient of every op, both implementations, against float64.

The rule: the root mean square of the error over all shapes is at most 1.5 times that of eager torch in the same
dtype, plus a tenth of a unit in the last place where both are exact; the largest single error at most 1.5 times the
largest of eager plus one unit (a maximum over a few elements is a lottery). In bf16 the interpreter truncates where
hardware rounds: two units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trebuchet.kernels import functional as K

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    ours: Callable[..., Tensor | Tensors]
    eager: Callable[..., Tensor | Tensors]  # what a model does, in the dtype of its inputs
    inputs: Callable[[int, int], list[Tensor]]  # (rows, width) -> float64 inputs
    fixed: int = 0  # the last inputs get no gradient


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def llama_norm(x: Tensor, w: Tensor, offset: float = 0.0) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (w + offset if offset else w) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    xf = x.to(wide)
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.to(wide))).to(x.dtype)


def add_norm(x: Tensor, r: Tensor, w: Tensor) -> Tensors:
    return llama_norm(x + r, w), x + r


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    q, k, c, s = q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    return q * c + rotate_half(q) * s, k * c + rotate_half(k) * s


def rope_inputs(rows: int, width: int) -> list[Tensor]:
    angle = torch.rand(1, rows, max(width // 2, 1), dtype=torch.float64) * 6
    angle = torch.cat([angle, angle], -1)
    return [randn(2, rows, 5, angle.shape[-1]), randn(2, rows, 2, angle.shape[-1]), angle.cos(), angle.sin()]


CASES = {
    "rms_norm llama": Case(
        lambda x, w: K.rms_norm(x, w, 1e-6), llama_norm, lambda n, h: [randn(n, h), randn(h)]
    ),
    "rms_norm llama offset": Case(
        lambda x, w: K.rms_norm(x, w, 1e-6, offset=1.0),
        lambda x, w: llama_norm(x, w, 1.0),
        lambda n, h: [randn(n, h), randn(h)],
    ),
    "rms_norm gemma": Case(
        lambda x, w: K.rms_norm(x, w, 1e-6, offset=1.0, casting="gemma"),
        gemma_norm,
        lambda n, h: [randn(n, h), randn(h)],
    ),
    "rms_norm frozen": Case(
        lambda x, w: K.rms_norm(x, w, 1e-6), llama_norm, lambda n, h: [randn(n, h), randn(h)], fixed=1
    ),
    "add_rms_norm": Case(
        lambda x, r, w: K.add_rms_norm(x, r, w, 1e-6), add_norm, lambda n, h: [randn(n, h), randn(n, h), randn(h)]
    ),
    "layer_norm": Case(
        lambda x, w, b: K.layer_norm(x, w, b, 1e-6),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
        lambda n, h: [randn(n, h) + 3.0, randn(h), randn(h)],
    ),
    "rope": Case(
        lambda q, k, c, s: K.rope(q.transpose(1, 2), k.transpose(1, 2), c, s), eager_rope, rope_inputs, fixed=2
    ),
    "swiglu": Case(K.swiglu, lambda e, g: F.silu(e) * g, lambda n, h: [randn(n, h) * 3, randn(n, h)]),
    "geglu tanh": Case(
        K.geglu, lambda e, g: F.gelu(e, approximate="tanh") * g, lambda n, h: [randn(n, h) * 3, randn(n, h)]
    ),
    "geglu exact": Case(
        lambda e, g: K.geglu(e, g, approximate="none"), lambda e, g: F.gelu(e) * g,
        lambda n, h: [randn(n, h) * 3, randn(n, h)],
    ),
}  # fmt: skip


def run(function: Callable, inputs: list[Tensor], dtype: torch.dtype, fixed: int) -> list[Tensor]:
    """Outputs and input gradients; upstream gradients are fixed random numbers, not ones."""
    leaves = [x.to(dtype).clone() for x in inputs]
    for x in leaves[: len(leaves) - fixed]:
        x.requires_grad_()
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    before = [x.detach().clone() for x in (*leaves, *upstream)]
    torch.autograd.backward(outputs, upstream)
    for x, y in zip((*leaves, *upstream), before, strict=True):
        assert torch.equal(x.detach(), y), "an input was written to"
    return [o.detach() for o in outputs] + [x.grad for x in leaves if x.grad is not None]


class Errors:
    """Errors against float64 of ours and of eager, each as a share of the largest value, over all shapes of a case."""

    def __init__(self) -> None:
        self.ours: dict[int, list[Tensor]] = {}
        self.eager: dict[int, list[Tensor]] = {}

    def add(self, ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
        assert len(ours) == len(eager) == len(exact)
        for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, f"{i}: {a.dtype} {a.shape}, eager {b.dtype} {b.shape}"
            assert torch.isfinite(a).all()
            scale = c.abs().max().clamp(min=1e-30)
            self.ours.setdefault(i, []).append(((a.double() - c) / scale).abs().flatten())
            self.eager.setdefault(i, []).append(((b.double() - c) / scale).abs().flatten())

    def check(self, eps: float, *, units: float = 0.0) -> None:
        for i in self.ours:
            ours, eager = torch.cat(self.ours[i]), torch.cat(self.eager[i])
            rms, rms_eager = ours.pow(2).mean().sqrt().item(), eager.pow(2).mean().sqrt().item()
            assert rms <= 1.5 * rms_eager + (0.1 + units) * eps, f"result {i}: rms {rms:.2g}, eager {rms_eager:.2g}"
            top, top_eager = ours.max().item(), eager.max().item()
            assert top <= 1.5 * top_eager + (1.0 + units) * eps, f"result {i}: largest {top:.2g}, eager {top_eager:.2g}"


SHAPES = [(1, 1), (3, 7), (33, 64), (3, 127), (3, 128), (5, 1000), (1, 1024), (2, 8193)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_error_against_float64(name: str, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case, errors = CASES[name], Errors()
    for rows, width in SHAPES:
        width += width % 2 if name == "rope" else 0
        if name == "rope" and width > 256:
            continue
        # Inputs that the dtype can hold, so that only the op's own error counts.
        inputs = [x.to(dtype).double() for x in case.inputs(rows, width)]
        exact = run(case.eager, inputs, torch.float64, case.fixed)
        eager = run(case.eager, inputs, dtype, case.fixed)
        with K.force_backend(backend):
            ours = run(case.ours, inputs, dtype, case.fixed)
        errors.add(ours, eager, exact)
    errors.check(torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [n for n in CASES if "norm" in n])
def test_rows_wider_than_one_block(name: str, backend: str) -> None:
    """Beyond 16,384 columns the kernels walk over the row in blocks; the last one here holds 5 columns."""
    torch.manual_seed(0)
    case, errors, width = CASES[name], Errors(), 4 * 4096 + 5
    inputs = [x.half().double() for x in case.inputs(3, width)]
    K.reset_calls()
    with K.force_backend(backend):
        ours = run(case.ours, inputs, torch.float16, case.fixed)
    assert {b for counts in K.calls().values() for b in counts} == {backend}
    eager = run(case.eager, inputs, torch.float16, case.fixed)
    errors.add(ours, eager, run(case.eager, inputs, torch.float64, case.fixed))
    errors.check(torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str, backend: str) -> None:
    """Storage in bf16: arithmetic must happen in fp32 (native bf16 arithmetic is garbage in the interpreter)."""
    torch.manual_seed(0)
    case, errors = CASES[name], Errors()
    inputs = [x.bfloat16().double() for x in case.inputs(5, 96)]
    exact = run(case.eager, inputs, torch.float64, case.fixed)
    eager = run(case.eager, inputs, torch.bfloat16, case.fixed)
    with K.force_backend(backend):
        ours = run(case.ours, inputs, torch.bfloat16, case.fixed)
    # Truncation costs one unit at every store: the result, and xhat of the llama norm before it.
    errors.add(ours, eager, exact)
    errors.check(torch.finfo(torch.bfloat16).eps, units=0.0 if backend == "torch" else 2.0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_numerically(name: str) -> None:
    """The derivation itself, by finite differences on the torch implementation in float64."""
    torch.manual_seed(1)
    case = CASES[name]
    inputs = case.inputs(3, 6)
    for x in inputs[: len(inputs) - case.fixed]:
        x.requires_grad_()
    assert torch.autograd.gradcheck(case.ours, inputs)
