"""Our kernels on a GPU: correctness first, then time, GB/s and share of the measured copy bandwidth.

    python benchmarks/kernels_gpu.py [--only rms_norm] [--json FILE]

Each op (`kernels_gpu_ops.py`), forward plus backward where it has one, beside eager torch, torch.compile of the same expression,
and liger-kernel or bitsandbytes; then one training step of a stack of 8B-shaped decoder layers with LoRA, patched against not. An op
whose numbers are wrong is reported and not timed; so is a step whose gradients are. Times are medians of CUDA events, with the caches
flushed before each run. GB/s count each input and output of the op once in each direction, so ops with matrix products, which the
arithmetic bounds, reach a small share of the copy. `--dry-run` walks the same code on a CPU with small shapes in place of times: it
proves the control flow and measures nothing.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernels_gpu_ops import Op, Sizes, ops
from torch import Tensor
from trebuchet.kernels import functional as K

LLAMA_8B = Sizes(rows=8192, width=4096, mlp=14336, vocab=128256)
SMALL = Sizes(rows=32, width=64, mlp=128, vocab=500, rank=4)


@dataclass(frozen=True, kw_only=True)
class Result:
    op: str
    implementation: str
    milliseconds: float | None
    gb_per_s: float | None
    share_of_copy: float | None
    note: str = ""


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
    copy = copy_bandwidth(device, 2**10 if args.dry_run else 2**30)
    results: list[Result] = []
    for name, op in ops(SMALL if args.dry_run else LLAMA_8B, device, dtype).items():
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
    implementations: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
        "ours": op.ours,
        "eager": op.eager,
        **op.peers,
    }
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(op.eager)
    K.reset_calls()
    wrong = wrong_by(op)
    ran = {backend for counts in K.calls().values() for backend in counts}
    expected = {"torch"} if device.type == "cpu" else {"triton"}
    nothing = {"milliseconds": None, "gb_per_s": None, "share_of_copy": None}
    if wrong or ran != expected:
        note = wrong or f"ran on {sorted(ran)}, not on {sorted(expected)}"
        return [Result(op=name, implementation="ours", note=note, **nothing)]
    inputs, found = op.inputs(op.rows), []
    for label, function in implementations.items():
        try:
            ms = median_ms(one_run(op, function, inputs), device)
        except Exception as error:  # another project's code, or too little memory for it, must not end the table
            if label == "ours" and not isinstance(error, torch.OutOfMemoryError):
                raise
            found.append(
                Result(op=name, implementation=label, note=f"{type(error).__name__}: {error}"[:120], **nothing)
            )
            continue
        rate = None if ms is None else op.least_bytes(inputs) / ms / 1e6
        share = None if rate is None or copy is None else rate / copy
        found.append(Result(op=name, implementation=label, milliseconds=ms, gb_per_s=rate, share_of_copy=share))
    return found


def one_run(op: Op, function: Callable, inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and, where there is one, backward pass, on tensors of its own."""
    leaves, upstream = prepared(op, function, inputs)
    if not op.backward:
        return lambda: function(*leaves)
    trained = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), trained, upstream)


def prepared(op: Op, function: Callable, inputs: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves of their own, and fixed random upstream gradients."""
    trained = len(inputs) - op.frozen if op.backward else 0
    # What is neither trained nor worked on in place stays shared: in fp64 the head alone is 4 GiB.
    leaves = [
        x.clone().requires_grad_(i < trained) if i < trained or not op.backward else x for i, x in enumerate(inputs)
    ]
    if not op.backward:
        return leaves, ()
    with torch.no_grad():
        out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    random = torch.Generator(outputs[0].device).manual_seed(1)
    # Rounded to bf16 for all, so that fp64 and 16 bits start from the same gradient.
    return leaves, tuple(torch.randn(o.shape, generator=random, device=o.device).bfloat16().to(o) for o in outputs)


def wrong_by(op: Op) -> str:
    """Empty if result and gradients are at most 1.5 times as far from fp64 as eager's (root mean square), else why not.

    On 256 rows of the real width, so that fp64 fits.
    """
    inputs = op.inputs(min(op.rows, 256))
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    results = []
    for function, given in ((op.eager, wide), (op.eager, inputs), (op.ours, inputs)):
        leaves, upstream = prepared(op, function, given)
        out = function(*leaves) if op.outcome is None else (function(*leaves), op.outcome(leaves))[1]
        outputs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], upstream) if op.backward else ()
        results.append([o.detach().double() for o in (*outputs, *grads)])
    for i, (exact, eager, ours) in enumerate(zip(*results, strict=True)):
        error, theirs, size = ((x.pow(2).mean().sqrt().item()) for x in (ours - exact, eager - exact, exact))
        if not error <= 1.5 * theirs + op.slack * size:
            return f"WRONG: result {i} is off by {error:.3g}, eager by {theirs:.3g}"
    return ""


def bench_step(device: torch.device, dtype: torch.dtype, layers: int, *, small: bool) -> list[Result]:
    """Forward and backward of a LoRA step on Llama-3-8B-shaped layers, plain and patched; 1 x 4,096 tokens."""
    size = dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    if not small:
        size = dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        )
    tokens = torch.randint(0, size["vocab_size"], (1, 32 if small else 4096), device=device)
    found, gradients = [], {}
    for label in ("eager", "ours"):
        ms, note = None, ""
        try:
            ms, note, gradients[label] = time_step(label == "ours", size | {"num_hidden_layers": layers}, tokens, dtype)
        except torch.OutOfMemoryError:
            note = "out of memory"
        gc.collect()  # models hold themselves in circles; what the first leaves would be in the second's peak
        # Both carry the rounding of 16 bits, a few per cent; a layer that is wrong is off by as much as there is.
        if len(gradients) == 2:
            apart = ((gradients["ours"] - gradients["eager"]).norm() / gradients["eager"].norm()).item()
            if not apart <= 0.1:
                ms, note = None, f"WRONG: the adapters' gradients differ by {apart:.1%}"
        found.append(Result(op=f"training step, {layers} layers", implementation=label, milliseconds=ms, gb_per_s=None,
                            share_of_copy=None, note=note))  # fmt: skip
    return found


def time_step(
    patched: bool, size: dict[str, int], tokens: Tensor, dtype: torch.dtype
) -> tuple[float | None, str, Tensor]:
    """(milliseconds, peak memory in words, the adapters' gradients of the first step in fp32) of one model."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trebuchet.kernels.patch import patch

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with tokens.device:
            model = LlamaForCausalLM(LlamaConfig(**size))
    finally:
        torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if patched:
        patch(model)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100  # the last token has no next one, as transformers sees it

    def once() -> None:
        if patched:
            logp = model(input_ids=tokens, token_labels=labels, use_cache=False).token_loss.logp
            loss = -logp.sum() / (tokens.numel() - len(tokens))
        else:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    K.reset_calls()
    once()
    gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    ran = {backend for counts in K.calls().values() for backend in counts}
    if patched and ran != {"triton" if tokens.is_cuda else "torch"}:
        raise RuntimeError(f"the patched step ran on {sorted(ran)}")
    peak = ""
    if tokens.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        peak = f"peak {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB above weights and gradients"
    return median_ms(once, tokens.device), peak, gradients


def median_ms(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float | None:
    """Median milliseconds of CUDA events; None on a CPU, where the function only runs once."""
    function()
    if device.type != "cuda":
        return None
    for _ in range(2):  # the first compiled and filled the allocator; these run as the timed ones do
        function()
    flush = torch.empty(2**29, dtype=torch.int8, device=device)  # 512 MiB, larger than any last cache of 2025
    times = []
    for _ in range(repeats):
        flush.zero_()
        # About a millisecond in which the host starts the kernels: else its own time would be measured for short ops.
        torch.cuda._sleep(2_000_000)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size_bytes: int) -> float | None:
    """GB/s of a device-to-device copy, read plus written; None on a CPU."""
    source = torch.empty(size_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return None if ms is None else 2 * size_bytes / ms / 1e6


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
