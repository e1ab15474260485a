"""Our kernels on a GPU: correctness first, then time, GB/s and share of the measured copy bandwidth.

    python benchmarks/kernels_gpu.py [--only rms_norm] [--json FILE]

Each op, forward plus backward, beside eager torch, torch.compile of the same expression, and liger-kernel where installed; then
one training step of a stack of 8B-shaped decoder layers with LoRA, patched against not. An op whose numbers are wrong is
reported and not timed. Times are medians of CUDA events, with the L2 cache flushed before each run. `--dry-run` walks the same
code on a CPU with small shapes in place of times: it proves the control flow and measures nothing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from trebuchet.kernels import functional as K


@dataclass(frozen=True, kw_only=True)
class Op:
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: list[tuple[int, ...]]
    least_bytes: Callable[[list[Tensor]], int]  # forward + backward: each input once, each output once
    liger: str | None = None  # name in liger_kernel.transformers.functional, called like `eager`
    frozen: int = 0  # the last inputs get no gradient


@dataclass(frozen=True, kw_only=True)
class Result:
    op: str
    implementation: str
    milliseconds: float | None
    gb_per_s: float | None
    share_of_copy: float | None
    note: str = ""


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def llama_norm(x: Tensor, w: Tensor) -> Tensor:
    xf = at_least_fp32(x)
    return w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def ops(small: bool) -> dict[str, Op]:
    rows, width, mlp, vocab = (32, 64, 96, 500) if small else (8192, 4096, 14336, 128256)

    def eager_loss(h: Tensor, w: Tensor) -> Tensor:
        return -F.log_softmax(at_least_fp32(F.linear(h, w)), -1)[:, 7]

    def our_loss(h: Tensor, w: Tensor) -> Tensor:
        return -K.token_loss(h, w, torch.full((len(h),), 7, device=h.device)).logp

    def eager_rope(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * c[:, None] + rotate_half(x) * s[:, None] for x in (q.transpose(1, 2), k.transpose(1, 2)))

    def our_rope(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        # The op reads the first half of the angles for both; `prepared` draws all four inputs at random.
        return K.rope(q.transpose(1, 2), k.transpose(1, 2), c, s)

    return {
        "rms_norm": Op(
            ours=lambda x, w: K.rms_norm(x, w, 1e-6), eager=llama_norm, shapes=[(rows, width), (width,)],
            least_bytes=lambda t: 5 * nbytes(t[0]),
        ),
        "add_rms_norm": Op(
            ours=lambda x, r, w: torch.add(*K.add_rms_norm(x, r, w, 1e-6)),
            eager=lambda x, r, w: llama_norm(x + r, w) + (x + r),
            shapes=[(rows, width), (rows, width), (width,)], least_bytes=lambda t: (8 + 5) * nbytes(t[0]),
        ),
        "layer_norm": Op(
            ours=lambda x, w, b: K.layer_norm(x, w, b, 1e-6), eager=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
            shapes=[(rows, width), (width,), (width,)], least_bytes=lambda t: 5 * nbytes(t[0]),
        ),
        "swiglu": Op(
            ours=K.swiglu, eager=lambda e, g: F.silu(e) * g, shapes=[(rows, mlp)] * 2, liger="liger_swiglu",
            least_bytes=lambda t: 8 * nbytes(t[0]),
        ),
        "geglu": Op(
            ours=K.geglu, eager=lambda e, g: F.gelu(e, approximate="tanh") * g, shapes=[(rows, mlp)] * 2,
            liger="liger_geglu", least_bytes=lambda t: 8 * nbytes(t[0]),
        ),
        "rope": Op(
            ours=our_rope, eager=eager_rope, shapes=[(1, rows, 32, 128), (1, rows, 8, 128), (1, rows, 128), (1, rows, 128)],
            frozen=2, least_bytes=lambda t: 4 * nbytes(*t[:2]) + 2 * nbytes(*t[2:]),
        ),
        "cross_entropy": Op(
            ours=lambda z: K.cross_entropy(z, torch.full((len(z),), 7, device=z.device))[0],
            eager=lambda z: F.cross_entropy(at_least_fp32(z), torch.full((len(z),), 7, device=z.device), reduction="none"),
            shapes=[(min(rows, 2048), vocab)], least_bytes=lambda t: 3 * nbytes(t[0]),
        ),
        "token_loss frozen": Op(
            ours=our_loss, eager=eager_loss, shapes=[(rows, width), (vocab, width)], frozen=1,
            least_bytes=lambda t: 3 * t[0].shape[0] * t[1].shape[0] * t[0].element_size(),
        ),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default=None, help="default: bf16 from sm_80 on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the training step")
    parser.add_argument(
        "--dry-run", action="store_true", help="small shapes on the CPU; proves the flow, measures nothing"
    )
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device; --dry-run walks the same code on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    bf16 = args.dry_run or torch.cuda.get_device_capability() >= (8, 0)
    dtype = getattr(torch, args.dtype or ("bfloat16" if bf16 else "float16"))
    copy = None if args.dry_run else copy_bandwidth(device)
    results: list[Result] = []
    for name, op in ops(args.dry_run).items():
        if args.only in name:
            results += bench_op(name, op, device, dtype, copy)
    if args.only in "training step":
        results += bench_step(device, dtype, 1 if args.dry_run else args.layers, small=args.dry_run)
    print(report(results, device, dtype, copy))
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(device), "results": [asdict(r) for r in results]}, indent=1)
        )
    return results


def bench_op(name: str, op: Op, device: torch.device, dtype: torch.dtype, copy: float | None) -> list[Result]:
    torch.manual_seed(0)
    inputs = [torch.randn(s, device=device).to(dtype) for s in op.shapes]
    for angles in inputs[2:] if name == "rope" else ():
        angles[..., angles.shape[-1] // 2 :] = angles[..., : angles.shape[-1] // 2]  # both halves alike, as in models
    if name.startswith("token_loss"):
        inputs[1] /= inputs[1].shape[1] ** 0.5  # logits of size one
    implementations: dict[str, Callable[..., Tensor]] = {"ours": op.ours, "eager": op.eager}
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(op.eager)
    if op.liger and device.type == "cuda":
        try:
            from liger_kernel.transformers import functional as liger

            implementations["liger-kernel"] = getattr(liger, op.liger)
        except ImportError:
            pass
    K.reset_calls()
    wrong = wrong_by(op, inputs)
    ran = {backend for counts in K.calls().values() for backend in counts}
    expected = {"torch"} if device.type == "cpu" else {"triton"}
    if wrong or ran != expected:
        return [Result(op=name, implementation="ours", milliseconds=None, gb_per_s=None, share_of_copy=None,
                       note=wrong or f"ran on {sorted(ran)}, not on {sorted(expected)}")]  # fmt: skip
    found = []
    for label, function in implementations.items():
        try:
            leaves, upstream = prepared(op, function, inputs)

            def once(function=function, leaves=leaves, upstream=upstream) -> None:
                torch.autograd.grad(function(*leaves), [x for x in leaves if x.requires_grad], upstream)

            ms = median_ms(once, device)
        except torch.OutOfMemoryError:
            found.append(Result(op=name, implementation=label, milliseconds=None, gb_per_s=None, share_of_copy=None,
                                note="out of memory"))  # fmt: skip
            continue
        rate = None if ms is None else op.least_bytes(inputs) / ms / 1e6
        share = None if rate is None or copy is None else rate / copy
        found.append(Result(op=name, implementation=label, milliseconds=ms, gb_per_s=rate, share_of_copy=share))
    return found


def prepared(op: Op, function: Callable, inputs: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves of their own, and fixed random upstream gradients."""
    trained = len(inputs) - op.frozen
    leaves = [x.clone().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    with torch.no_grad():
        out = function(*leaves)
    random = torch.Generator().manual_seed(1)
    outputs = out if isinstance(out, tuple) else (out,)
    return leaves, tuple(torch.randn(o.shape, generator=random).to(o) for o in outputs)


def wrong_by(op: Op, inputs: list[Tensor]) -> str:
    """Empty if result and gradients are at most 1.5 times as far from fp64 as eager's (root mean square), else why not.

    On 256 rows of the real width, so that fp64 fits.
    """
    rows = inputs[0].shape[-2] if inputs[0].dim() == 2 else inputs[0].shape[1]
    cut = [x[:, :256] if x.dim() > 2 else x[:256] if x.dim() == 2 and len(x) == rows else x for x in inputs]
    results = []
    for function, kind in ((op.eager, torch.float64), (op.eager, None), (op.ours, None)):
        leaves, upstream = prepared(op, function, [x.to(kind or x.dtype) for x in cut])
        out = function(*leaves)
        grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], upstream)
        outputs = out if isinstance(out, tuple) else (out,)
        results.append([o.detach().double() for o in (*outputs, *grads)])
    for i, (exact, eager, ours) in enumerate(zip(*results, strict=True)):
        error, theirs, size = ((x.pow(2).mean().sqrt().item()) for x in (ours - exact, eager - exact, exact))
        if not error <= 1.5 * theirs + 1e-6 * size:
            return f"WRONG: result {i} is off by {error:.3g}, eager by {theirs:.3g}"
    return ""


def bench_step(device: torch.device, dtype: torch.dtype, layers: int, *, small: bool) -> list[Result]:
    """Forward and backward of a LoRA step on Llama-3-8B-shaped layers, plain and patched; 1 x 4,096 tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trebuchet.kernels.patch import patch

    size = dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    if not small:
        size = dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        )
    tokens = torch.randint(0, size["vocab_size"], (1, 32 if small else 4096), device=device)
    found = []
    for label in ("eager", "ours"):
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **size)).to(dtype)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        if label == "ours":
            patch(model)

        def once(model=model, label=label) -> None:
            if label == "ours":
                out = model(input_ids=tokens, token_labels=tokens.roll(-1, 1))
                loss = -out.token_loss.logp.mean()
            else:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(once, device)
        peak = f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else ""
        found.append(Result(op=f"training step, {layers} layers", implementation=label, milliseconds=ms, gb_per_s=None,
                            share_of_copy=None, note=peak))  # fmt: skip
        del model
    return found


def median_ms(function: Callable[[], None], device: torch.device, repeats: int = 20) -> float | None:
    """Median milliseconds of CUDA events; None on a CPU, where the function only runs once."""
    function()
    if device.type != "cuda":
        return None
    flush = torch.empty(2**28, dtype=torch.int8, device=device)  # 256 MiB, larger than any L2
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a 1 GiB device-to-device copy, read plus written."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source) and None, device)
    assert ms is not None
    return 2 * 2**30 / ms / 1e6


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU (dry run: no times)"
    return {
        "device": name,
        "torch": torch.__version__,
        "launch_table": K.launch_table_hash(),
        "when": time.strftime("%F"),
    }


def report(results: list[Result], device: torch.device, dtype: torch.dtype, copy: float | None) -> str:
    lines = [f"{machine(device)}, {dtype}" + (f", copy {copy:.0f} GB/s" if copy else "")]
    lines += ["| op | implementation | ms | GB/s | of copy | |", "| --- | --- | --- | --- | --- | --- |"]
    for r in results:
        ms, rate, share = (
            "-" if v is None else form.format(v)
            for v, form in ((r.milliseconds, "{:.3f}"), (r.gb_per_s, "{:.0f}"), (r.share_of_copy, "{:.0%}"))
        )
        lines.append(f"| {r.op} | {r.implementation} | {ms} | {rate} | {share} | {r.note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
