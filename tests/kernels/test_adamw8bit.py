"""The 8-bit AdamW step: against bitsandbytes' op on the same states, and both of its halves against first
principles."""

import bitsandbytes.functional as bnb
import pytest
import torch
from trebuchet.kernels import functional as K
from trebuchet.kernels.adamw8bit import _quantize

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3, "grad_scale": 0.5}


def state(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """param, grad, both states, both absmaxes; a block whose states are all zero."""
    torch.manual_seed(0)
    q = [torch.randint(0, 256, (n,)).byte() for _ in range(2)]
    absmax = [torch.rand(-(-n // 256)) + 0.01 for _ in range(2)]
    absmax[0][0] = absmax[1][0] = 0.0
    return [torch.randn(n).to(dtype), torch.randn(n).to(dtype), *q, *absmax]


def levels() -> tuple[torch.Tensor, torch.Tensor]:
    return bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("n", [1, 256, 1000, 5000])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_step_as_bitsandbytes(backend: str, n: int, dtype: torch.dtype) -> None:
    ours, theirs = state(n, dtype), state(n, dtype)
    gradient = ours[1].clone()
    with K.force_backend(backend):
        K.adamw8bit_step(*ours, *levels(), **SETTINGS)
    p, g, s1, s2, a1, a2 = theirs
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", g, p, s1, s2, 0.9, 0.95, 0.0, 0.0, 1e-8, 3, 1e-2, *levels(), a1, a2, 0.1, 0.5, False
    )
    assert torch.equal(ours[1], gradient)
    # The same arithmetic in another order: a unit of the parameter's dtype.
    torch.testing.assert_close(ours[0], p, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    for mine, other in ((ours[4], a1), (ours[5], a2)):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0.0)
    # bitsandbytes' CPU quantizer is not exact (ours is: below); they differ by one coarse step at most.
    decoded = zip((ours[2], ours[3]), (s1, s2), levels(), strict=True)
    for mine, other, qmap in decoded:
        torch.testing.assert_close(qmap[mine.int()], qmap[other.int()], rtol=0.0, atol=0.0142)
        assert (mine != other).float().mean() < 0.1


def test_nearest_level() -> None:
    """Against the definition, in float64: the level with the smallest distance."""
    torch.manual_seed(0)
    for qmap in levels():
        values = torch.randn(4 * 256) if qmap.min() < 0 else torch.rand(4 * 256)
        code, absmax = _quantize(values, qmap, 256)
        scaled = values.view(4, 256).double() / absmax.double().unsqueeze(1)
        distance = (scaled.unsqueeze(-1) - qmap.double()).abs()
        chosen = distance.gather(-1, code.view(4, 256, 1).long()).squeeze(-1)
        # 1e-7: dividing in fp32 before comparing.
        assert (chosen <= distance.amin(-1) + 1e-7).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_follows_adamw(backend: str) -> None:
    """Twenty steps on a quadratic stay within a few per cent of torch's AdamW: the quantization error of 8 bits."""
    torch.manual_seed(0)
    target, n = torch.randn(600), 600
    reference = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.AdamW([reference], lr=0.05, betas=(0.9, 0.999), weight_decay=0.01)
    p, zeros = torch.zeros(n), [torch.zeros(3), torch.zeros(3)]
    qmaps = levels()
    codes = [torch.full((n,), int(q.abs().argmin())).byte() for q in qmaps]
    for step in range(1, 21):
        reference.grad = reference.detach() - target
        optimizer.step()
        with K.force_backend(backend):
            K.adamw8bit_step(p, p - target, *codes, *zeros, *qmaps, lr=0.05, weight_decay=0.01, step=step)
    assert (p - reference.detach()).norm() / reference.detach().norm() < 0.05


def test_a_view_is_refused() -> None:
    p, g, *rest = state(512, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        K.adamw8bit_step(p[::2], g[::2], *rest, *levels(), lr=1e-3, step=1)
