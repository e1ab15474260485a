"""LoRA layers: against autograd over the formula, with dense and NF4 bases, alone, grouped and as an MLP."""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trebuchet.kernels import functional as K
from trebuchet.kernels.functional import LoraLinear
from trebuchet.kernels.nf4 import NF4Weight

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda e: F.gelu(e, approximate="tanh"),
}


def layer(
    out: int, inner: int, rank: int = 2, *, bias: bool = False, trained: bool = False
) -> dict[str, Tensor | None]:
    def make(*shape: int, grad: bool = True) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * 0.3).requires_grad_(grad)

    return {
        "weight": make(out, inner, grad=trained), "A": make(rank, inner), "B": make(out, rank),
        "bias": make(out) if bias else None,
    }  # fmt: skip


def formula(x: Tensor, p: dict, scaling: float, x_lora: Tensor | None = None) -> Tensor:
    return F.linear(x, p["weight"], p["bias"]) + scaling * (x if x_lora is None else x_lora) @ p["A"].t() @ p["B"].t()


def ours(p: dict, scaling: float, **more) -> LoraLinear:
    return LoraLinear(weight=p["weight"], A=p["A"], B=p["B"], bias=p["bias"], scaling=scaling, **more)


def same_gradients(first: Tensor, second: Tensor, leaves: list[Tensor]) -> None:
    upstream = torch.randn_like(first)
    expected = torch.autograd.grad(first, leaves, upstream, retain_graph=True)
    for a, b in zip(torch.autograd.grad(second, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(second, first)


def leaves_of(*parts: dict) -> list[Tensor]:
    return [t for p in parts for t in p.values() if t is not None and t.requires_grad]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_linear(bias: bool, trained: bool, dropped: bool) -> None:
    torch.manual_seed(0)
    p, x = layer(6, 5, bias=bias, trained=trained), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    x_lora = F.dropout(x, 0.5) if dropped else None
    result = K.lora_linear(x, p["weight"], p["A"], p["B"], 0.7, p["bias"], x_lora)
    same_gradients(formula(x, p, 0.7, x_lora), result, [x, *leaves_of(p)])


def test_projections_share_one_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parts = [layer(6, 5), layer(3, 5, rank=1, bias=True, trained=True), layer(4, 5)]
    parts[2] |= {"A": None, "B": None}  # one projection without an adapter
    result = K.lora_qkv(x, *(ours(p, 0.5) for p in parts))
    expected = [formula(x, parts[0], 0.5), formula(x, parts[1], 0.5), F.linear(x, parts[2]["weight"])]
    same_gradients(torch.cat(expected, -1), torch.cat(result, -1), [x, *leaves_of(*parts)])


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_unused_projection(unused: int) -> None:
    torch.manual_seed(0)
    x, parts = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), [layer(6, 5), layer(3, 5), layer(4, 5)]
    result = K.lora_qkv(x, *(ours(p, 0.5) for p in parts))
    used = [i for i in range(3) if i != unused]
    same_gradients(
        torch.cat([formula(x, parts[i], 0.5) for i in used], -1),
        torch.cat([result[i] for i in used], -1),
        [x, *leaves_of(*(parts[i] for i in used))],
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("activation", ACT)
def test_mlp(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "torch" else torch.float32
    gate, up, down = layer(8, 5), layer(8, 5, trained=True), layer(5, 8, bias=True)
    for p in (gate, up, down):
        p |= {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in p.items() if v is not None}
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    expected = formula(ACT[activation](formula(x, gate, 0.5)) * formula(x, up, 2.0), down, 0.25)
    with K.force_backend(backend):
        result = K.lora_mlp(x, ours(gate, 0.5), ours(up, 2.0), ours(down, 0.25), activation=activation)
    same_gradients(expected, result, [x, *leaves_of(gate, up, down)])


def test_gradients_numerically() -> None:
    """By finite differences, undefined upstream gradients included."""
    torch.manual_seed(0)
    gate, up, down = layer(4, 3, trained=True), layer(4, 3), layer(3, 4, bias=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def mlp(x: Tensor, *_leaves: Tensor) -> Tensor:
        return K.lora_mlp(x, ours(gate, 0.5), ours(up, 2.0), ours(down, 0.25))

    assert torch.autograd.gradcheck(mlp, (x, *leaves_of(gate, up, down)))
    assert torch.autograd.gradcheck(
        lambda x, *_: K.lora_qkv(x, ours(gate, 0.5), ours(up, 2.0)), (x, *leaves_of(gate, up))
    )


def linear_of(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [formula(x, dict(zip(("weight", "A", "B"), w, strict=True)) | {"bias": None}, 0.5)]


def our(w: list[Tensor]) -> LoraLinear:
    return LoraLinear(weight=w[0], A=w[1], B=w[2], scaling=0.5)


# {op: (ours, eager)}, both of x and the (weight, A, B) of three layers.
OPS: dict[str, tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]] = {
    "lora_linear": (lambda x, a, b, c: [K.lora_linear(x, *a, 0.5)], lambda x, a, b, c: linear_of(x, a)),
    "lora_qkv": (
        lambda x, a, b, c: list(K.lora_qkv(x, our(a), our(b))), lambda x, a, b, c: [*linear_of(x, a), *linear_of(x, b)],
    ),
    "lora_mlp": (
        lambda x, a, b, c: [K.lora_mlp(x, our(a), our(b), our(c))],
        lambda x, a, b, c: linear_of(F.silu(linear_of(x, a)[0]) * linear_of(x, b)[0], c),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_error_against_float64(name: str, backend: str, dtype: torch.dtype) -> None:
    """Results and every gradient: root mean square of the error at most 1.5 times eager's in the same dtype, plus a quarter
    of a unit where both are exact; rows lie apart, and inputs are what they were."""
    torch.manual_seed(0)
    inner, wide = 33, 70  # odd, and not a multiple of anything
    x = torch.randn(29, 2 * inner)
    shapes = [(wide, inner), (wide, inner), (inner, wide)]
    weights = [[torch.randn(o, i) * i**-0.5, torch.randn(5, i) * i**-0.5, torch.randn(o, 5) * 0.3] for o, i in shapes]
    results = []
    for function, kind in ((OPS[name][1], torch.float64), (OPS[name][1], dtype), (OPS[name][0], dtype)):
        rows = x.to(dtype).to(kind)[:, :inner].requires_grad_()
        layers = [[t.to(dtype).to(kind).requires_grad_(k > 0) for k, t in enumerate(w)] for w in weights]
        leaves = [rows, *(t for w in layers for t in w)]
        before = [t.detach().clone() for t in leaves]
        with K.force_backend(backend):
            out = function(rows, *layers)
        random = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=random).half().to(kind) for o in out]
        grads = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], upstream, allow_unused=True)
        assert all(torch.equal(t.detach(), old) for t, old in zip(leaves, before, strict=True))
        results.append([t.detach().double() for t in (*out, *grads) if t is not None])
    assert len(results[2]) == len(results[0]) > len(out)
    for i, (exact, eager, ours) in enumerate(zip(*results, strict=True)):
        error, theirs, size = ((t.pow(2).mean().sqrt().item()) for t in (ours - exact, eager - exact, exact))
        assert error <= 1.5 * theirs + 0.25 * torch.finfo(dtype).eps * size, f"{i}: {error:.2g}, eager {theirs:.2g}"


@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch(name: str) -> None:
    x = torch.randn(0, 6, requires_grad=True)
    layers = [[torch.randn(o, i), torch.randn(2, i), torch.randn(o, 2)] for o, i in ((4, 6), (4, 6), (6, 4))]
    for layer_ in layers:
        layer_[1].requires_grad_()
    out = OPS[name][0](x, *layers)
    sum(o.sum() for o in out).backward()
    assert all(o.shape[0] == 0 for o in out) and x.grad.shape == x.shape and not layers[0][1].grad.any()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_nf4_base(nested: bool) -> None:
    """The same as on the dequantized weight, bit for bit; the weight is dequantized once in each pass and never
    saved."""
    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(torch.randn(96, 64).half(), quant_type="nf4", compress_statistics=nested)
    weight = NF4Weight.from_bitsandbytes(packed, state)
    dense = K.nf4_dequantize(weight, torch.float32)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    x = torch.randn(7, 64, requires_grad=True)
    saved: list[Tensor] = []
    K.reset_calls()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = K.lora_linear(x, weight, A, B, 0.5)
    expected = K.lora_linear(x, dense, A, B, 0.5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, A, B]) for y in (result, expected)), strict=True):
        assert torch.equal(a, b)
    assert K.calls()["nf4_dequantize"] == {"torch": 2}
    assert any(t.data_ptr() == weight.packed.data_ptr() for t in saved), (
        "the packed weight must pass the saved-tensor hooks"
    )
    assert max(t.numel() for t in saved) <= max(weight.packed.numel(), x.numel())


def test_products_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """dy B is formed once, no product of dy and x of the size of W; of the MLP's wide tensors only e and g are kept."""
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: shapes.append((tuple(a.shape), tuple(b.shape))) or mm(a, b, **k))
    gate, up, down = layer(64, 24), layer(64, 24), layer(24, 64)
    x = torch.randn(10, 24, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = K.lora_mlp(x, ours(gate, 1.0), ours(up, 1.0), ours(down, 1.0))
    shapes.clear()
    y.sum().backward()
    assert shapes.count(((10, 24), (24, 2))) == 1, "dy B of down"
    assert shapes.count(((10, 64), (64, 2))) == 2, "de B of gate and dg B of up"
    assert ((24, 10), (10, 64)) not in shapes and ((64, 10), (10, 24)) not in shapes, "a frozen base gets no gradient"
    assert gate["weight"].grad is None
    wide = {t.data_ptr() for t in saved if t.shape == (10, 64)}
    assert len(wide) == 2, "e and g, not their product"


def test_gradients_in_the_dtype_of_each_tensor() -> None:
    """PEFT keeps adapters in fp32 over a bf16 base."""
    x, W = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(4, 8).bfloat16()
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    y = K.lora_linear(x, W, A, B, 1.0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and A.grad.dtype == B.grad.dtype == torch.float32


def test_autocast() -> None:
    """Under autocast the op computes in autocast's dtype, as the layers it replaces do."""
    x, W = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = K.lora_linear(x, W, A, B, 1.0), F.linear(x, W)
        logp = K.token_loss(x, W, torch.tensor([0, 1, 2])).logp
    y.sum().backward()
    assert y.dtype == plain.dtype == torch.bfloat16 and x.grad.dtype == A.grad.dtype == torch.float32
    assert logp.dtype == torch.float32
