"""The door: which implementation runs, that it is counted, registered properly, and refuses what cannot work."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck
from trebuchet.kernels import dispatch, launch_table
from trebuchet.kernels import functional as K
from trebuchet.kernels.cross_entropy import cross_entropy
from trebuchet.kernels.glu import glu
from trebuchet.kernels.lora import LoraLinear, lora_mlp, lora_project, pack
from trebuchet.kernels.loss import token_loss
from trebuchet.kernels.nf4 import nf4_dequantize
from trebuchet.kernels.norms import add_rms_norm, layer_norm, rms_norm
from trebuchet.kernels.rope import rope


def samples(backend: str) -> dict[str, tuple]:
    def t(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=grad)

    labels = torch.tensor([1, -100, 3])
    projection = LoraLinear(weight=t(6, 8, grad=False), A=t(2, 8), B=t(6, 2), scaling=0.5, bias=t(6))
    down = LoraLinear(weight=t(8, 6, grad=False), A=t(2, 6), B=t(8, 2))
    q, k = t(1, 2, 3, 8).transpose(1, 2), t(1, 2, 1, 8).transpose(1, 2)
    table, positions = torch.randn(9, 8), torch.tensor([[4, 0]])
    blocks = torch.rand(2)
    return {
        "rms_norm": (rms_norm, (t(3, 8), t(8), 1e-6, 0.0, "llama", backend)),
        "add_rms_norm": (add_rms_norm, (t(3, 8), t(3, 8), t(8), 1e-6, 1.0, "gemma", backend)),
        "layer_norm": (layer_norm, (t(3, 8), t(8), t(8), 1e-6, backend)),
        "rope": (rope, (q, k, table, table.clone(), positions, False, backend)),
        "glu": (glu, (t(3, 8), t(3, 8), "silu", backend)),
        "token_loss frozen": (
            token_loss, (t(3, 8), t(9, 8, grad=False), labels, None, None, 1.0, -100, True, True, True, 2, backend),
        ),
        "token_loss trained": (
            token_loss, (t(3, 8), t(9, 8), labels, t(9), 2.0, 0.5, -100, False, False, False, 2, backend),
        ),
        "cross_entropy": (cross_entropy, (t(3, 9), labels, -100, None, 1.0, backend)),
        "nf4_dequantize": (
            nf4_dequantize,
            (
                torch.randint(0, 255, (64,)).byte(), blocks, torch.randn(16), None, None, None, (2, 64), torch.float16,
                64, 256, backend,
            ),
        ),
        "lora_project": (lora_project, (t(3, 8), *pack([projection, projection]), backend)),
        "lora_mlp": (lora_mlp, (t(3, 8), *pack([projection, projection, down]), "silu", backend)),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", samples("torch"))
def test_registration(name: str, backend: str) -> None:
    """Schema, aliasing, autograd registration, fake tensors and AOT dispatch, by torch's own checker."""
    op, arguments = samples(backend)[name]
    opcheck(op, arguments)


def test_mutation_is_declared() -> None:
    from trebuchet.kernels.adamw8bit import adamw8bit_step

    p, g, s, a = torch.randn(300), torch.randn(300), torch.zeros(300).byte(), torch.rand(2)
    q = torch.linspace(-1, 1, 256)
    arguments = (p, g, s, s.clone(), a, a.clone(), q, q.clone(), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 1.0, 256, "torch")
    opcheck(adamw8bit_step, arguments)


def test_choice_is_counted_and_follows_into_the_backward_pass() -> None:
    x, w = torch.randn(2, 8, requires_grad=True), torch.randn(8)
    K.reset_calls()
    with K.force_backend("triton"):
        y = K.rms_norm(x, w, 1e-6)
        with K.force_backend("torch"):
            K.rms_norm(x, w, 1e-6)
    y.sum().backward()  # outside the block: still what the forward pass used
    K.swiglu(x, x)
    assert K.calls() == {
        "rms_norm": {"triton": 1, "torch": 1}, "rms_norm_backward": {"triton": 1}, "swiglu": {"torch": 1},
    }  # fmt: skip


def test_a_forced_choice_that_cannot_work_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    with K.force_backend("triton"), pytest.raises(K.KernelUnavailable, match="float64"):
        K.swiglu(x.double(), x.double())
    with pytest.raises(ValueError, match="cuda"):
        K.force_backend("cuda").__enter__()
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        with pytest.raises(K.KernelUnavailable, match="TRITON_INTERPRET"), K.force_backend("triton"):
            pass
    assert dispatch._forced is None


def test_default_choice() -> None:
    x = torch.randn(2, 8)
    assert dispatch.choose("op", x) == "torch"
    assert dispatch.choose("op", torch.empty(0, device="meta")) == "torch"


def test_compiles_without_graph_breaks() -> None:
    """torch.compile(fullgraph) through forward and backward: same numbers, no break."""
    torch.manual_seed(0)
    weight, labels = torch.randn(50, 8), torch.randint(0, 50, (6,))

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y, s = K.add_rms_norm(x, x, w, 1e-6)
        h = K.lora_mlp(y, *(LoraLinear(weight=w[:, None] * w) for _ in range(3))) + K.swiglu(s, s)
        return -K.token_loss(h, weight, labels).logp.mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, w = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_(), torch.linspace(0.5, 1.5, 8).requires_grad_()
        loss = function(x, w)
        results.append([loss, *torch.autograd.grad(loss, [x, w])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_hash_is_stable_and_sees_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes agree; any change of a number changes the hash."""
    command = "from trebuchet.kernels.launch_table import launch_table_hash as h; print(h())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    before = K.launch_table_hash()
    assert other == before
    json.dumps(launch_table.TABLE)
    for kernel, settings in launch_table.TABLE.items():
        for key, value in settings.items():
            with monkeypatch.context() as changed:
                changed.setitem(settings, key, value + 1)
                assert K.launch_table_hash() != before, (kernel, key)


def test_chunks_of_the_loss_cover_the_ridge() -> None:
    """Reading W (V x H) twice for 2 C V H flops each is hidden by C >= peak FLOP/s over bytes/s: 16 bits, data sheets.

    T4 65 T / 320 G, A100 312 T / 2.04 T, H100 989 T / 3.35 T, H200 989 T / 4.8 T; with dW, read and written in fp32 and
    half as much work again, four times that. Nothing but device and head decides, so all ranks choose alike.
    """
    ridges = [65e12 / 320e9, 312e12 / 2.04e12, 989e12 / 3.35e12, 989e12 / 4.8e12]
    assert launch_table.token_chunk("cuda", trained=False) >= max(ridges)
    assert launch_table.token_chunk("cuda", trained=True) >= 4 * max(ridges)
    assert [*inspect.signature(launch_table.token_chunk).parameters] == ["device_type", "trained"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: K.rms_norm(x, torch.ones(3), 1e-6), "as wide as x"),
        (lambda x: K.rms_norm(x, torch.ones(8), 1e-6, casting="none"), "'llama' or 'gemma'"),
        (lambda x: K.add_rms_norm(x, x[:1], torch.ones(8), 1e-6), "must be like x"),
        (lambda x: K.swiglu(x, x[:, :4]), "one shape and dtype"),
        (lambda x: K.geglu(x, x, approximate="sigmoid"), "approximate"),
        (lambda x: K.token_loss(x, torch.ones(5, 7), torch.zeros(2).long()), "do not fit together"),
        (lambda x: K.cross_entropy(x, torch.zeros(3).long()), "do not fit together"),
        (lambda x: K.rope(x[None, None], x[None], x, x), "same B, T and D"),
        (lambda x: K.lora_linear(x, torch.ones(5, 7), None, None, 1.0), "does not fit"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 8))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_and_strided(backend: str) -> None:
    """No rows at all, and inputs whose rows lie apart or run backwards through a transpose."""
    empty, w = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    wide, tall = torch.randn(5, 24), torch.randn(8, 5)
    with K.force_backend(backend):
        outputs = [
            K.rms_norm(empty, w, 1e-6), *K.add_rms_norm(empty, empty, w, 1e-6), K.layer_norm(empty, w, w, 1e-6),
            K.swiglu(empty, empty), *K.rope(*[torch.randn(2, 3, 0, 8)] * 2, torch.ones(1, 0, 8), torch.ones(1, 0, 8)),
        ]  # fmt: skip
        sum(o.sum() for o in outputs).backward()
        strided = [
            K.rms_norm(wide[:, 8:16], w, 1e-6),
            K.rms_norm(tall.t(), w, 1e-6),
            K.swiglu(*wide[:, :16].chunk(2, 1)),
        ]
        dense = [
            K.rms_norm(wide[:, 8:16].contiguous(), w, 1e-6), K.rms_norm(tall.t().contiguous(), w, 1e-6),
            K.swiglu(wide[:, :8].contiguous(), wide[:, 8:16].contiguous()),
        ]  # fmt: skip
    assert all(o.numel() == 0 for o in outputs) and not w.grad.any()
    for a, b in zip(strided, dense, strict=True):
        if backend == "triton":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)  # torch's sums add in another order over strided memory


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rope_positions_and_partial_width(backend: str) -> None:
    """A table with positions equals gathering first; channels past the rotary width pass through; strides are kept."""
    torch.manual_seed(0)
    angle = torch.rand(20, 8)
    table = torch.cat([angle, angle], -1)
    positions = torch.tensor([[0, 1, 2, 0, 1], [19, 3, 3, 0, 7]])  # packed, padded, repeated
    q, k = torch.randn(2, 5, 6, 24).transpose(1, 2), torch.randn(2, 5, 3, 24).transpose(1, 2)
    with K.force_backend(backend):
        q1, k1 = K.rope(q, k, table.cos(), table.sin(), positions)
        q2, k2 = K.rope(q, k, table.cos()[positions], table.sin()[positions])
        back, _ = K.rope(q1, k1, table.cos(), -table.sin(), positions)
    assert torch.equal(q1, q2) and torch.equal(k1, k2) and q1.stride() == q.stride()
    assert torch.equal(q1[..., 16:], q[..., 16:]) and not torch.equal(q1[..., :16], q[..., :16])
    torch.testing.assert_close(back, q, rtol=1e-6, atol=1e-6)  # a rotation: its conjugate is its inverse
