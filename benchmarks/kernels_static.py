"""Our kernels beside liger-kernel's, without a GPU: registers, spills, shared memory, instructions, bytes.

    python benchmarks/kernels_static.py [--targets sm_80 sm_90] [--json FILE]         (pip install liger-kernel)

Both sides are started through their own Python entry points on CPU tensors, so block sizes and warps are those that
each project would use; the start itself is intercepted and the kernel compiled for each chip as in
`trebuchet.kernels.aot`. Bytes come from Triton's interpreter (fp16, few rows), per element of the op, as issued /
distinct addresses. Three of liger-kernel's files need a name rebound to run there (`_make_interpretable`); its
kernels stay as shipped. Leaves out time: see kernels_gpu.py.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Enough rows that every program of a backward pass walks over several, as in training.
ROWS, WIDTH, MLP, VOCAB = 2048, 4096, 14336, 128256
# Ours, theirs, elements of the op, and elements of one row (RoPE: of one token).
Op = tuple[Callable[[], object], Callable[[], object], int, int]


def ops(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Op]:
    """Each op at one production size, forward and backward apart; the weight trains unless the name says frozen."""
    from liger_kernel.ops import cross_entropy as their_ce
    from liger_kernel.ops import fused_add_rms_norm as their_add
    from liger_kernel.ops import geglu as their_geglu
    from liger_kernel.ops import layer_norm as their_ln
    from liger_kernel.ops import rms_norm as their_rms
    from liger_kernel.ops import rope as their_rope
    from liger_kernel.ops import swiglu as their_swiglu
    from trebuchet.kernels.triton_kernels import glu, layer_norm, loss, rms_norm, rope

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x, r, w, stat = new(rows, WIDTH), new(rows, WIDTH), new(WIDTH), torch.rand(rows)
    e, g, dh = new(rows, MLP), new(rows, MLP), new(rows, MLP)
    q, k, angles = new(1, rows, 32, 128), new(1, rows, 8, 128), new(1, rows, 128)
    ce_rows = min(rows, 8)
    z, labels = new(ce_rows, VOCAB), torch.randint(0, VOCAB, (ce_rows,))
    upstream = torch.full((ce_rows,), 1.0 / ce_rows)
    size, mlp = x.numel(), e.numel()

    def ours_ce() -> None:
        _, lse, _, _, rest = loss.stats(z, labels, None, 1.0, False, False)
        loss.gradient(z, labels, lse, rest, None, (upstream, None, None), None, 1.0, out=z)

    def their_cross_entropy() -> None:
        # Summed and divided by the number of tokens afterwards, as Hugging Face training does.
        logits = z.detach().requires_grad_()  # without this it computes no gradient
        their_ce.cross_entropy_forward(logits, labels, None, -100, 0.0, 0.0, "sum", None, False)
        their_ce.cross_entropy_backward(logits, torch.tensor(1.0 / ce_rows))

    def their_rope_forward() -> None:
        their_rope.rope_forward(q.clone().transpose(1, 2), k.clone().transpose(1, 2), angles, angles.clone())

    def their_backward(**more: Any) -> Callable[[], object]:
        return lambda: their_rms.rms_norm_backward(x, r, w, stat, 0.0, 0, 4096, 8, False, None, **more)

    return {
        "rms_norm forward": (
            lambda: rms_norm.forward(x, None, w, 1e-6, 0.0, "llama", dtype),
            lambda: their_rms.rms_norm_forward(x, w, 1e-6, 0.0, "llama", None), size, WIDTH,
        ),
        "rms_norm backward frozen": (
            lambda: rms_norm.backward(x, r, w, stat, None, 0.0, "llama", False), their_backward(needs_dw=False), size, WIDTH,
        ),
        "rms_norm backward": (
            lambda: rms_norm.backward(x, r, w, stat, None, 0.0, "llama", True), their_backward(), size, WIDTH,
        ),
        "add_rms_norm forward": (
            lambda: rms_norm.forward(x, r, w, 1e-6, 0.0, "llama", dtype),
            lambda: their_add.fused_add_rms_norm_forward(x, r, w, 1e-6, 0.0, "llama"), size, WIDTH,
        ),
        "add_rms_norm backward": (
            lambda: rms_norm.backward(x, r, w, stat, x.clone(), 0.0, "llama", True),
            lambda: their_add.fused_add_rms_norm_backward(x, x.clone(), r, w, stat, 0.0, 0, 4096, 8, None, False), size, WIDTH,
        ),
        "layer_norm forward": (
            lambda: layer_norm.forward(x, w, w.clone(), 1e-6),
            lambda: their_ln.layer_norm_forward(x, w, w.clone(), 1e-6), size, WIDTH,
        ),
        "layer_norm backward": (
            lambda: layer_norm.backward(x, r, w, stat, stat.clone(), True),
            lambda: their_ln.layer_norm_backward(x, r, w, w.clone(), stat, stat.clone()), size, WIDTH,
        ),
        "rope q32 k8 D=128": (
            lambda: rope.launch(q.transpose(1, 2), k.transpose(1, 2), angles, angles.clone(), None, False),
            their_rope_forward, q.numel() + k.numel(), 40 * 128,
        ),
        "swiglu forward": (lambda: glu.forward(e, g, "silu"), lambda: their_swiglu.swiglu_forward(e, g), mlp, MLP),
        "swiglu backward": (
            lambda: glu.backward(dh, e, g, "silu", False),
            lambda: their_swiglu.swiglu_backward(e.clone(), g.clone(), dh), mlp, MLP,
        ),
        "geglu tanh forward": (lambda: glu.forward(e, g, "gelu_tanh"), lambda: their_geglu.geglu_forward(e, g), mlp, MLP),
        "geglu tanh backward": (
            lambda: glu.backward(dh, e, g, "gelu_tanh", False),
            lambda: their_geglu.geglu_backward(e.clone(), g.clone(), dh), mlp, MLP,
        ),
        "cross_entropy forward + backward": (ours_ce, their_cross_entropy, z.numel(), VOCAB),
    }  # fmt: skip


def compiled(target: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{op: {"ours" | "liger": figures}} for one chip, summed or maximized over the launches of the op."""
    from trebuchet.kernels import aot
    from trebuchet.kernels.triton_kernels.launch import Launch
    from triton.runtime.jit import JITFunction

    _as_on(target)
    run, started = JITFunction.run, []

    def intercept(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        started.append(Launch(self, grid, args, options))

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (ours, theirs, _, row) in ops(torch.float16 if target == "sm_75" else torch.bfloat16).items():
        found[name] = {}
        for side, call in (("ours", ours), ("liger", theirs)):
            started.clear()
            JITFunction.run = intercept  # type: ignore[method-assign]
            try:
                call()
            finally:
                JITFunction.run = run  # type: ignore[method-assign]
            parts = []
            for launch in started:
                kernel = aot.compile_launch(launch, target)
                per_program = aot.inspect(kernel) | {"warps": kernel.metadata.num_warps}
                work = per_program["instructions"] * per_program["warps"]
                parts.append(per_program | {"per_element": work / _elements(launch, row)})
            found[name][side] = {
                "registers": max(p["registers"] for p in parts),
                "stack_bytes": sum(p["stack_bytes"] for p in parts),
                "shared_bytes": max(p["shared_bytes"] for p in parts),
                "instructions": sum(p["instructions"] for p in parts),
                "warps": max(p["warps"] for p in parts),
                "per_element": round(sum(p["per_element"] for p in parts), 3),
                "narrowest_wide_load": min(int(next(iter(p["load_bits"]), 0)) for p in parts),
            }
    return found


def _elements(launch: Any, row: int) -> int:
    """Elements that one walk through the code of a program handles: its block, at most the row; all heads for RoPE."""
    options = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    if "rope" in launch.kernel.__name__:
        return row // -(-options["HALF"] // options["BLOCK"]) if "HALF" in options else row
    if "PARTS" in options:
        return options["PARTS"] * options["LANES"] * options["WIDTH"]
    return min(options.get("BLOCK_SIZE") or options["BLOCK"] * options.get("ROWS", 1), row)


def counted() -> dict[str, dict[str, Any]]:
    """{op: {"ours" | "liger": [issued, distinct] bytes per element, or why it did not run}}, in the interpreter,
    fp16."""
    from trebuchet.kernels.launch_table import TABLE
    from trebuchet.kernels.trace import trace

    _make_interpretable()
    for kernel in ("rms_norm_backward", "layer_norm_backward"):
        # On a CPU liger-kernel starts one program for all rows; the same here, else partial sums of dw would be compared.
        TABLE[kernel] |= {"programs": 1, "programs_dw": 1}
    found: dict[str, dict[str, Any]] = {}
    for name, (ours, theirs, elements, _) in ops(torch.float16, rows=16).items():
        found[name] = {}
        for side, call in (("ours", ours), ("liger", theirs)):
            try:
                with trace() as launches:
                    call()
            except Exception as error:  # liger-kernel is another project's code: report, do not stop
                if side == "ours":
                    raise
                found[name][side] = f"{type(error).__name__}: {error}"[:120]
                continue
            issued = sum(t.issued_read_bytes + t.issued_written_bytes for t in launches)
            distinct = sum(t.read_bytes + t.written_bytes for t in launches)
            found[name][side] = [round(issued / elements, 3), round(distinct / elements, 3)]
    return found


def _as_on(target: str) -> None:
    """liger-kernel chooses warps and tiles by the name of the architecture."""
    import liger_kernel.ops.cross_entropy as their_ce
    import liger_kernel.ops.swiglu as their_swiglu

    arch = "blackwell" if target == "sm_100" else "ampere"
    for module in (their_ce, their_swiglu):
        module.infer_device_arch = lambda: arch


def _make_interpretable() -> None:
    """Float arguments become fp32 scalars, and libdevice's rsqrt and tanh the language's own, as compiled code has."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, geglu, layer_norm, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    for module in (rms_norm, fused_add_rms_norm, layer_norm):
        module.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up late: the interpreter replaces what tl holds
    geglu.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0


def report(per_target: dict[str, dict], byte_counts: dict[str, dict[str, Any]]) -> str:
    """A Markdown table for each chip, and what liger-kernel does with less."""
    lines = []
    for target, table in per_target.items():
        lines += [
            f"\n{target}: ours / liger-kernel",
            "",
            "| op | registers | stack B | shared B | instr. x warps / element | bytes / element |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for name, sides in table.items():
            a, b = sides["ours"], sides["liger"]
            cells = [f"{a[key]} / {b[key]}" for key in ("registers", "stack_bytes", "shared_bytes", "per_element")]
            sizes = byte_counts[name]
            theirs = sizes["liger"][0] if isinstance(sizes["liger"], list) else "did not run"
            lines.append(f"| {name} | {' | '.join(cells)} | {sizes['ours'][0]} / {theirs} |")
    return "\n".join([*lines, "", *(worse(per_target, byte_counts) or ["nowhere worse than liger-kernel"])])


def worse(per_target: dict[str, dict], byte_counts: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each figure that liger-kernel's kernels have lower."""
    found = []
    for target, table in per_target.items():
        for name, sides in table.items():
            for key in ("registers", "stack_bytes", "shared_bytes", "per_element"):
                if sides["ours"][key] > sides["liger"][key]:
                    found.append(f"worse: {name} on {target}: {key} {sides['ours'][key]}, theirs {sides['liger'][key]}")
    for name, sides in byte_counts.items():
        if isinstance(sides["liger"], list):
            for kind, mine, theirs in zip(("issued", "distinct"), sides["ours"], sides["liger"], strict=True):
                if mine > theirs:
                    found.append(f"worse: {name}: {kind} bytes per element {mine}, theirs {theirs}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100"])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--part", choices=["bytes", *(f"sm_{n}" for n in (75, 80, 86, 89, 90, 100))], help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.part:
        print(json.dumps(counted() if args.part == "bytes" else compiled(args.part)))
        return
    found = {part: _in_its_own_process(part) for part in ("bytes", *args.targets)}
    byte_counts = found.pop("bytes")
    print(report(found, byte_counts))
    if args.json:
        args.json.write_text(json.dumps({"bytes": byte_counts, "compiled": found}, indent=1))


def _in_its_own_process(part: str) -> dict[str, Any]:
    """The interpreter and each target bind Triton for a whole process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if part == "bytes":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, "--part", part]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
