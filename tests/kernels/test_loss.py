"""token_loss and cross_entropy: values and gradients against float64, ignored tokens, extreme logits, memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trebuchet.kernels import functional as K

IGNORE = -100
BACKENDS = ["torch", "triton"]


def eager_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap=None, logit_scale: float = 1.0
) -> list[Tensor]:
    """logp, lse, entropy the way models compute them: logits in the dtype of the model, then fp32."""
    z = F.linear(hidden, weight, bias)
    z = (z.float() if z.dtype != torch.float64 else z) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse, p, valid = z.logsumexp(-1), z.log_softmax(-1), labels != IGNORE
    logp = p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return [torch.where(valid, x, 0.0) for x in (logp, lse, -(p.exp() * p).sum(-1))]


def gradients(outputs: list[Tensor], leaves: list[Tensor], upstream: tuple[bool, bool, bool]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    total = sum((o * w.to(o.dtype)).sum() for o, w, used in zip(outputs, weights, upstream, strict=True) if used)
    return list(torch.autograd.grad(total, leaves))


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


OPTIONS = {"plain": {}, "scaled": {"logit_scale": 0.25}, "negative": {"logit_scale": -1.5}, "softcap": {"softcap": 5.0}}


LOGP, LSE, ALL = (True, False, False), (False, True, False), (True, True, True)
COMBINATIONS = [
    ("plain", False, LOGP), ("plain", False, LSE), ("plain", False, ALL), ("plain", True, LOGP), ("plain", True, ALL),
    ("scaled", False, ALL), ("negative", True, ALL), ("softcap", False, LOGP), ("softcap", True, ALL),
]  # fmt: skip


@pytest.mark.parametrize(("option", "trained", "upstream"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_against_float64(dtype, backend: str, option: str, trained: bool, upstream) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 16, 24), torch.randn(4999, 24) * 0.3, torch.randn(4999)]
    labels = torch.randint(0, 4999, (2, 16))
    labels[0, 1] = labels[1, 4] = IGNORE
    results = []
    for function, kind in ((eager_loss, torch.float64), (eager_loss, dtype), (_ours(backend), dtype)):
        leaves = [x.to(dtype).to(kind).requires_grad_(i == 0 or trained) for i, x in enumerate(inputs)]
        before = [x.detach().clone() for x in (*leaves, labels)]
        outputs = function(leaves[0], leaves[1], labels, leaves[2], **OPTIONS[option])
        results.append(outputs + gradients(outputs, [x for x in leaves if x.requires_grad], upstream))
        assert all(torch.equal(x.detach(), old) for x, old in zip((*leaves, labels), before, strict=True))
    for i, (exact, eager, ours) in enumerate(zip(*results, strict=True)):
        assert ours.shape == exact.shape
        # Root mean square: a unit gradient row is rounded before its upstream factor and after it, independently. The
        # same ratio on the largest of 100,000 errors would be a lottery. One unit of slack in fp32: the products of a
        # chunk of 16 rows add in another order than those of all 32.
        error, theirs = rms(ours.double() - exact), rms(eager.double() - exact)
        slack = 1.0 if dtype == torch.float32 else 0.25
        assert error <= 1.5 * theirs + slack * torch.finfo(dtype).eps * rms(exact), f"{i}: {error:.2g} {theirs:.2g}"


def _ours(backend: str) -> Callable[..., list[Tensor]]:
    def call(hidden, weight, labels, bias, **options):
        with K.force_backend(backend):
            out = K.token_loss(hidden, weight, labels, bias=bias, chunk=16, return_entropy=True, **options)
        return [out.logp, out.lse, out.entropy]

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_argmax_and_shapes(backend: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8), torch.randn(9000, 8)
    labels = torch.randint(0, 9000, (2, 3))
    with K.force_backend(backend):
        out = K.token_loss(hidden, weight, labels, return_argmax=True)
    assert torch.equal(out.argmax, F.linear(hidden, weight).argmax(-1)) and out.argmax.dtype == torch.int64
    assert out.logp.shape == out.lse.shape == (2, 3) and out.logp.dtype == torch.float32 and out.entropy is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 4])
def test_no_token_counts(backend: str, count: int) -> None:
    """An empty batch, and one whose labels are all ignored: zeros, and zero gradients of the right shape."""
    hidden, weight = torch.randn(count, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with K.force_backend(backend):
        out = K.token_loss(hidden, weight, torch.full((count,), IGNORE), return_entropy=True, return_argmax=True)
    (out.logp.sum() + out.entropy.sum()).backward()
    for x in (*out, hidden.grad, weight.grad):
        assert not x.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    logits = torch.randn(count, 50, requires_grad=True)
    with K.force_backend(backend):
        loss, lse = K.cross_entropy(logits, torch.full((count,), IGNORE))
    (loss.sum() + lse.sum()).backward()
    assert loss.shape == lse.shape == (count,) and not loss.any() and not logits.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_infinite_logits(backend: str) -> None:
    """Logits of 1e4 in fp16's range, and -inf (a forbidden token): nothing overflows, entropy keeps its digits."""
    torch.manual_seed(0)
    z = torch.randn(4, 5000, dtype=torch.float64) + 1e4
    z[1] = torch.where(torch.arange(5000) % 2 == 0, z[1], -torch.inf)
    z[2] = -1e4
    z[3, 7] = 2e4
    labels = torch.tensor([1, 2, 3, 7])
    weight, hidden = torch.eye(4, dtype=torch.float32), z.float()
    with K.force_backend(backend):
        # The product with one-hot rows hands z through unchanged.
        out = K.token_loss(weight, hidden.nan_to_num(neginf=-3e38).t().contiguous(), labels, return_entropy=True)
        leaf = z.float().requires_grad_()
        loss, lse = K.cross_entropy(leaf, labels)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    exact = z.float().double()
    logp = exact.log_softmax(-1)
    expected = logp.gather(1, labels[:, None]).squeeze(1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
    # fp32 holds 1e4, and so lse, to 5e-4; the others do not contain that magnitude and must be as good as eager's.
    torch.testing.assert_close(lse.double(), exact.logsumexp(-1), atol=5e-4, rtol=0)
    torch.testing.assert_close(out.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    eager = F.cross_entropy(z.float().requires_grad_(), labels, reduction="none")
    bound = 1.5 * rms(eager.double() + expected) + torch.finfo(torch.float32).eps * rms(expected)
    assert rms(loss.double() + expected) <= bound and rms(out.logp.double() - expected) <= bound
    p = logp.exp() - F.one_hot(labels, 5000)
    torch.testing.assert_close(grad.double(), p, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_cross_entropy(backend: str, dtype: torch.dtype) -> None:
    """Against F.cross_entropy in float64 and in eager fp32; strided logits; both outputs carry gradients; 262,144
    columns."""
    torch.manual_seed(0)
    wide = (torch.randn(3, 262144 + 5) * 4).to(dtype)
    labels = torch.tensor([262143, IGNORE, 5])
    z = wide[:, 5:].requires_grad_()
    before = z.detach().clone()

    def eager(kind: torch.dtype) -> list[Tensor]:
        leaf = z.detach().to(dtype if kind == torch.float32 else kind).requires_grad_()
        capped = 30.0 * torch.tanh(leaf.to(kind) / 30.0)
        loss = F.cross_entropy(capped, labels, reduction="none", ignore_index=IGNORE)
        lse = torch.where(labels != IGNORE, capped.logsumexp(-1), 0.0)
        return [loss, lse, *torch.autograd.grad((loss * 0.3 + lse * 0.1).sum(), leaf)]

    with K.force_backend(backend):
        loss, lse = K.cross_entropy(z, labels, softcap=30.0)
    (grad,) = torch.autograd.grad((loss * 0.3 + lse * 0.1).sum(), z)
    exact = eager(torch.float64)
    for ours, true, theirs in zip((loss, lse, grad), exact, eager(torch.float32), strict=True):
        error, slack = rms(ours.double() - true), torch.finfo(ours.dtype).eps / 4
        assert error <= 1.5 * rms(theirs.double() - true) + slack * rms(true), error
    # And by itself: a sum of 262,144 terms in pairs, a logarithm and a difference near 18, each within units of fp32
    # (2e-6 is 17 of them). Eager's log_softmax is 5e-5 off here where torch has no AVX-512.
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-6, atol=2e-6)
    # One rounding of the result (fp16: also below its smallest normal number, 6e-8 apart) and exp's error in fp32.
    torch.testing.assert_close(grad.double(), exact[2], rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=6e-8)
    assert torch.equal(z.detach(), before) and not grad[1].any()


def test_chunk_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(40, 16), torch.randn(300, 16), torch.randint(0, 300, (40,))
    labels[::3] = IGNORE
    results = []
    for chunk in (1, 7, 40, 4096):
        h = hidden.clone().requires_grad_()
        K.token_loss(h, weight, labels, chunk=chunk).logp.sum().backward()
        results.append(h.grad)
    for grad in results[1:]:
        torch.testing.assert_close(grad, results[0], rtol=1e-5, atol=1e-6)  # another summation order inside mm


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head costs two products per chunk for logp, none for ignored tokens; a trained one four."""
    sizes: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: sizes.append(max(a.shape[0], b.shape[1])) or mm(a, b, **k))
    labels = torch.tensor([3, IGNORE, 1, IGNORE])
    for trained, expected in ((False, 2), (True, 4)):
        sizes.clear()
        hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=trained)
        K.token_loss(hidden, weight, labels).logp.sum().backward()
        assert len(sizes) == expected and hidden.grad is not None and (weight.grad is not None) == trained


def test_logits_are_never_whole() -> None:
    """No tensor of tokens x vocabulary, nor of vocabulary x hidden in fp32 for a frozen head, is ever allocated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(3000, 8)
    with Largest() as seen:
        K.token_loss(hidden, weight, torch.randint(0, 3000, (512,)), chunk=16).logp.sum().backward()
    assert seen.elements <= max(16 * 3000, 3000 * 8)
