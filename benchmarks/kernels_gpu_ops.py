"""What `kernels_gpu.py` runs: each op as ours, as eager torch, and as liger-kernel or bitsandbytes where they have it.

Every function takes the same tensors, trained ones first, and returns what is compared; inputs are drawn for any number of
rows, so that correctness can be checked against fp64 on few. Leaves out the timing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor
from trebuchet.kernels import functional as K
from trebuchet.kernels.nf4 import NF4Weight

Function = Callable[..., Tensor | tuple[Tensor, ...]]
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


@dataclass(frozen=True, kw_only=True)
class Op:
    ours: Function
    eager: Function
    inputs: Callable[[int], list[Tensor]]  # rows -> tensors in the dtype that is timed
    least_bytes: Callable[[list[Tensor]], int]  # each input once, each output once; forward + backward
    rows: int
    frozen: int = 0  # the last inputs get no gradient
    backward: bool = True  # False: the op has none, and works on its inputs as they are
    outcome: Callable[[list[Tensor]], tuple[Tensor, ...]] | None = None  # what to compare, where the op works in place
    slack: float = 1e-6  # of the size of a result, beside 1.5 times eager's error
    peers: dict[str, Function] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Llama-3-8B's, or small ones for a dry run."""

    rows: int
    width: int
    mlp: int
    vocab: int
    rank: int = 16


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def llama_norm(x: Tensor, w: Tensor) -> Tensor:
    xf = at_least_fp32(x)
    return w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * c[:, None] + torch.cat((-b, a), -1) * s[:, None]


def dequantized(packed: Tensor, q: Tensor, code: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """[numel] in the dtype of `code`, by table look-up."""
    absmax = code2[q.int()] * absmax2.repeat_interleave(256)[: len(q)] + offset
    nibbles = torch.stack((packed >> 4, packed & 15), -1).flatten().int()
    return (code[nibbles].view(-1, 64) * absmax.unsqueeze(1)).flatten()


def adamw(p: Tensor, g: Tensor, s1: Tensor, s2: Tensor, a1: Tensor, a2: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    """One AdamW step on 8-bit states in eager torch, in place."""
    beta1, beta2, t, lr = ADAM["beta1"], ADAM["beta2"], ADAM["step"], ADAM["lr"]
    gf = at_least_fp32(g)
    m = beta1 * q1[s1.int()] * a1.repeat_interleave(256) + (1 - beta1) * gf
    v = beta2 * q2[s2.int()] * a2.repeat_interleave(256) + (1 - beta2) * gf * gf
    update = m / (v.sqrt() / (1 - beta2**t) ** 0.5 + ADAM["eps"])
    p.copy_(at_least_fp32(p) * (1 - lr * ADAM["weight_decay"]) - lr / (1 - beta1**t) * update)
    for x, code, absmax, levels in ((m, s1, a1, q1), (v, s2, a2, q2)):
        absmax.copy_(x.view(-1, 256).abs().amax(1))
        code.copy_(torch.bucketize((x.view(-1, 256) / absmax.unsqueeze(1)).flatten(), (levels[1:] + levels[:-1]) * 0.5))
    return p


def our_adamw(p: Tensor, g: Tensor, *states: Tensor) -> Tensor:
    K.adamw8bit_step(p, g, *states, **ADAM)
    return p


def their_adamw(p: Tensor, g: Tensor, s1: Tensor, s2: Tensor, a1: Tensor, a2: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    b1, b2, eps, t, lr, wd = (ADAM[k] for k in ("beta1", "beta2", "eps", "step", "lr", "weight_decay"))
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", g, p, s1, s2, b1, b2, 0.0, 0.0, eps, t, lr, q1, q2, a1, a2, wd, 1.0, False
    )
    return p


def parameter_and_states(t: list[Tensor]) -> tuple[Tensor, ...]:
    """p and both states, dequantized, after a step."""
    p, _, s1, s2, a1, a2, q1, q2 = t
    return p, q1[s1.int()] * a1.repeat_interleave(256), q2[s2.int()] * a2.repeat_interleave(256)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def ops(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Op]:
    """Every op of the layer at the sizes given."""
    width, mlp, vocab = sizes.width, sizes.mlp, sizes.vocab

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def labels(x: Tensor) -> Tensor:
        return torch.full((len(x),), 7, device=x.device)

    def angles(rows: int) -> list[Tensor]:
        half = torch.rand(1, rows, 64, device=device) * 6.28
        both = torch.cat([half, half], -1)
        return [both.cos().to(dtype), both.sin().to(dtype)]

    def op(ours: Function, eager: Function, inputs: Callable[[int], list[Tensor]], least: Callable, **more) -> Op:
        return Op(ours=ours, eager=eager, inputs=inputs, least_bytes=least, **({"rows": sizes.rows} | more))

    liger = _liger(labels) if device.type == "cuda" else {}
    found = {
        "rms_norm": op(
            lambda x, w: K.rms_norm(x, w, 1e-6), llama_norm, lambda n: [randn(n, width), randn(width)],
            lambda t: 5 * nbytes(t[0]),
        ),
        "add_rms_norm": op(
            lambda x, r, w: K.add_rms_norm(x, r, w, 1e-6), lambda x, r, w: (llama_norm(x + r, w), x + r),
            lambda n: [randn(n, width), randn(n, width), randn(width)], lambda t: 8 * nbytes(t[0]),
        ),
        "layer_norm": op(
            lambda x, w, b: K.layer_norm(x, w, b, 1e-6), lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
            lambda n: [randn(n, width), randn(width), randn(width)], lambda t: 5 * nbytes(t[0]),
        ),
        "swiglu": op(
            lambda e, g: K.swiglu(e, g), lambda e, g: F.silu(e) * g, lambda n: [randn(n, mlp), randn(n, mlp)],
            lambda t: 8 * nbytes(t[0]),
        ),
        "geglu": op(
            lambda e, g: K.geglu(e, g), lambda e, g: F.gelu(e, approximate="tanh") * g,
            lambda n: [randn(n, mlp), randn(n, mlp)], lambda t: 8 * nbytes(t[0]),
        ),
        "rope": op(
            lambda q, k, c, s: K.rope(q.transpose(1, 2), k.transpose(1, 2), c, s),
            lambda q, k, c, s: (rotated(q.transpose(1, 2), c, s), rotated(k.transpose(1, 2), c, s)),
            lambda n: [randn(1, n, 32, 128), randn(1, n, 8, 128), *angles(n)],
            lambda t: 4 * nbytes(*t[:2]) + 2 * nbytes(*t[2:]), frozen=2,
        ),
        "cross_entropy": op(
            lambda z: K.cross_entropy(z, labels(z))[0],
            lambda z: F.cross_entropy(at_least_fp32(z), labels(z), reduction="none"), lambda n: [randn(n, vocab)],
            lambda t: 3 * nbytes(t[0]), rows=min(sizes.rows, 2048),
        ),
        "token_loss frozen": op(
            lambda h, w: -K.token_loss(h, w, labels(h)).logp,
            lambda h, w: -F.log_softmax(at_least_fp32(F.linear(h, w)), -1)[:, 7],
            lambda n: [randn(n, width), randn(vocab, width, scale=width**-0.5)],
            lambda t: 3 * nbytes(t[0]) + 2 * nbytes(t[1]), frozen=1,
        ),
        **_weight_ops(sizes, device, dtype, randn),
    }  # fmt: skip
    return {name: Op(**(vars(o) | {"peers": o.peers | liger.get(name, {})})) for name, o in found.items()}


def _weight_ops(sizes: Sizes, device: torch.device, dtype: torch.dtype, randn: Callable[..., Tensor]) -> dict[str, Op]:
    """NF4, LoRA on a dense and an NF4 base, and the 8-bit optimizer step."""
    width, mlp, rank = sizes.width, sizes.mlp, sizes.rank

    def nf4(out: int, inner: int) -> list[Tensor]:
        packed, state = bnb.quantize_4bit(
            randn(out, inner, scale=inner**-0.5), quant_type="nf4", blocksize=64, compress_statistics=True
        )
        w = NF4Weight.from_bitsandbytes(packed, state)
        return [w.packed.view(-1), w.absmax, w.code, w.code2, w.absmax2, w.offset]  # type: ignore[list-item]

    def bundle(parts: tuple[Tensor, ...], out: int, inner: int) -> NF4Weight:
        packed, absmax, code, code2, absmax2, offset = parts
        return NF4Weight(
            packed=packed, absmax=absmax, code=code, shape=(out, inner), dtype=dtype, code2=code2, absmax2=absmax2, offset=offset
        )  # fmt: skip

    def base(parts: tuple[Tensor, ...], out: int, inner: int, like: Tensor) -> Tensor:
        return parts[0] if len(parts) == 1 else dequantized(*parts).to(like.dtype).view(out, inner)

    def their_nf4(*parts: Tensor) -> Tensor:
        packed, absmax, code, code2, absmax2, offset = parts
        inner = bnb.QuantState(absmax=absmax2, code=code2, blocksize=256, dtype=torch.float32)
        state = bnb.QuantState(
            absmax=absmax, shape=(mlp, width), code=code, blocksize=64, quant_type="nf4", dtype=dtype, offset=offset, state2=inner
        )  # fmt: skip
        return bnb.dequantize_4bit(packed.view(-1, 1), state)

    def pairs(*shapes: tuple[int, int]) -> list[Tensor]:
        return [t for o, i in shapes for t in (randn(rank, i, scale=i**-0.5), randn(o, rank, scale=0.1))]

    def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)

    def ours(w, a: Tensor, b: Tensor) -> K.LoraLinear:
        return K.LoraLinear(weight=w, A=a, B=b, scaling=2.0)

    qkv, gated = [(width, width), (width // 4, width), (width // 4, width)], [(mlp, width), (mlp, width), (width, mlp)]

    def eager_mlp(x: Tensor, a1, b1, a2, b2, a3, b3, w1, w2, w3) -> Tensor:
        return lora(F.silu(lora(x, w1, a1, b1)) * lora(x, w2, a2, b2), w3, a3, b3)

    def adam_state(rows: int) -> list[Tensor]:
        numel = rows * width
        levels = [bnb.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        codes = [torch.randint(0, 256, (numel,), device=device).byte() for _ in range(2)]
        absmax = [torch.rand(numel // 256, device=device) + 0.01 for _ in range(2)]
        return [randn(numel), randn(numel), *codes, *absmax, *levels]

    linear = {"rows": sizes.rows, "slack": 1e-4}
    return {
        "nf4_dequantize": Op(
            ours=lambda *w: K.nf4_dequantize(bundle(w, mlp, width)),
            eager=lambda *w: dequantized(*w).to(dtype if w[2].dtype == torch.float32 else w[2].dtype).view(mlp, width),
            inputs=lambda n: nf4(mlp, width), least_bytes=lambda t: nbytes(*t[:2]) + mlp * width * dtype.itemsize,
            rows=sizes.rows, backward=False, peers={"bitsandbytes": their_nf4},
        ),
        "lora_linear": Op(
            ours=lambda x, a, b, w: K.lora_linear(x, w, a, b, 2.0), eager=lambda x, a, b, w: lora(x, w, a, b),
            inputs=lambda n: [randn(n, width), *pairs((mlp, width)), randn(mlp, width, scale=width**-0.5)],
            least_bytes=lambda t: 3 * nbytes(t[0]) + 2 * nbytes(*t[1:]) + 2 * len(t[0]) * mlp * dtype.itemsize,
            frozen=1, **linear,
        ),
        "lora_linear NF4": Op(
            ours=lambda x, a, b, *w: K.lora_linear(x, bundle(w, mlp, width), a, b, 2.0),
            eager=lambda x, a, b, *w: lora(x, base(w, mlp, width, x), a, b),
            inputs=lambda n: [randn(n, width), *pairs((mlp, width)), *nf4(mlp, width)],
            least_bytes=lambda t: 3 * nbytes(t[0]) + 2 * nbytes(*t[1:]) + 2 * len(t[0]) * mlp * dtype.itemsize,
            frozen=6, **linear,
        ),
        "lora_qkv": Op(
            ours=lambda x, a1, b1, a2, b2, a3, b3, *w: K.lora_qkv(x, ours(w[0], a1, b1), ours(w[1], a2, b2), ours(w[2], a3, b3)),
            eager=lambda x, a1, b1, a2, b2, a3, b3, *w: (lora(x, w[0], a1, b1), lora(x, w[1], a2, b2), lora(x, w[2], a3, b3)),
            inputs=lambda n: [randn(n, width), *pairs(*qkv), *(randn(o, i, scale=i**-0.5) for o, i in qkv)],
            least_bytes=lambda t: 3 * nbytes(t[0]) + 2 * nbytes(*t[1:]) + 3 * nbytes(t[0]), frozen=3, **linear,
        ),
        "lora_mlp": Op(
            ours=lambda x, a1, b1, a2, b2, a3, b3, *w: K.lora_mlp(
                x, ours(w[0], a1, b1), ours(w[1], a2, b2), ours(w[2], a3, b3)
            ),
            eager=eager_mlp,
            inputs=lambda n: [randn(n, width), *pairs(*gated), *(randn(o, i, scale=i**-0.5) for o, i in gated)],
            least_bytes=lambda t: 5 * nbytes(t[0]) + 2 * nbytes(*t[1:]),
            frozen=3, **linear,
        ),
        "adamw8bit_step": Op(
            ours=our_adamw, eager=adamw, inputs=adam_state, rows=sizes.rows, backward=False, slack=1e-3, outcome=parameter_and_states,
            least_bytes=lambda t: 3 * t[0].numel() * dtype.itemsize + 4 * t[2].numel() + 2 * nbytes(*t[4:6]),
            peers={"bitsandbytes": their_adamw},
        ),
    }  # fmt: skip


def _liger(labels: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Function]]:
    """liger-kernel's functions by op; none where it is not installed. Its losses come summed, as it is used in training."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return {}
    found: dict[str, Function] = {
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, 1e-6, 0.0, "llama", False),
        "add_rms_norm": lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, 1e-6, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-6),
        "swiglu": liger.liger_swiglu,
        "geglu": liger.liger_geglu,
        "rope": lambda q, k, c, s: liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), c, s)[:2],
        "cross_entropy": lambda z: liger.liger_cross_entropy(z, labels(z), reduction="sum"),
        "token_loss frozen": lambda h, w: liger.liger_fused_linear_cross_entropy(h, w, labels(h), reduction="sum"),
    }
    return {name: {"liger-kernel": function} for name, function in found.items()}
