"""The launches that are compiled ahead of time: every kernel at production sizes. Data for `aot`; runs nothing.

Each case calls the launcher that a run would call, on unwritten CPU tensors, so block sizes, warps and the alignment
that the JIT specializes on are those of the run. Only widths and strides matter to the compiler, so rows are few.
"""

from collections.abc import Callable

import torch

from .triton_kernels import adamw8bit, glu, layer_norm, loss, nf4, rms_norm, rope, wide_norm
from .triton_kernels.launch import Launch, record

ROWS = 4096


def cases(dtype: torch.dtype) -> dict[str, Launch]:
    """{"kernel size variant": launch} with 16-bit tensors of `dtype`."""
    found: dict[str, Launch] = {}
    for name, call in (_norms(dtype) | _elementwise(dtype) | _losses(dtype) | _weights(dtype)).items():
        with record() as launches:
            call()
        for launch in launches:
            found[name if len(launches) == 1 else f"{name} {launch.kernel.__name__}"] = launch
    return found


def _norms(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for width in (128, 2048, 4096, 5120, 8192):
        x, w = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        stat = torch.empty(ROWS)
        calls |= {
            f"rms_norm forward H={width}": _call(rms_norm.forward, x, None, w, 1e-6, 0.0, "llama", dtype),
            f"rms_norm backward H={width} frozen": _call(rms_norm.backward, x, x, w, stat, None, 0.0, "llama", False),
            f"rms_norm backward H={width} dw": _call(rms_norm.backward, x, x, w, stat, None, 0.0, "llama", True),
        }
        if width in (4096, 8192):
            gemma = (1.0, "gemma")
            calls |= {
                f"rms_norm forward H={width} gemma": _call(rms_norm.forward, x, None, w, 1e-6, *gemma, dtype),
                f"add_rms_norm forward H={width}": _call(rms_norm.forward, x, x, w, 1e-6, 0.0, "llama", dtype),
                f"add_rms_norm backward H={width} frozen": _call(
                    rms_norm.backward, x, x, w, stat, x, 0.0, "llama", False
                ),
                f"add_rms_norm backward H={width} dw": _call(rms_norm.backward, x, x, w, stat, x, 0.0, "llama", True),
                f"layer_norm forward H={width}": _call(layer_norm.forward, x, w, w, 1e-6),
                f"layer_norm backward H={width} frozen": _call(layer_norm.backward, x, x, w, stat, stat, False),
                f"layer_norm backward H={width} dw db": _call(layer_norm.backward, x, x, w, stat, stat, True),
            }
    x, w, stat = torch.empty(64, 32768, dtype=dtype), torch.empty(32768, dtype=dtype), torch.empty(64)
    return calls | {
        "add_rms_norm forward H=32768": _call(wide_norm.forward, x, x, w, None, 1e-6, 0.0, "llama", dtype),
        "layer_norm forward H=32768": _call(wide_norm.forward, x, None, w, w, 1e-6, 0.0, "gemma", dtype),
        "rms_norm backward H=32768 dw": _call(wide_norm.backward, x, x, w, None, stat, x, 0.0, "llama", True),
        "layer_norm backward H=32768 dw db": _call(wide_norm.backward, x, x, w, stat, stat, None, 0.0, "gemma", True),
    }


def _elementwise(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for width in (14336, 28672):
        e = torch.empty(ROWS, width, dtype=dtype)
        calls |= {
            f"swiglu forward F={width}": _call(glu.forward, e, e, "silu"),
            f"swiglu backward F={width}": _call(glu.backward, e, e, e, "silu", False),
        }
    halves = torch.empty(ROWS, 2 * 8192, dtype=dtype).chunk(2, dim=-1)
    calls |= {
        "swiglu forward F=8192 packed": _call(glu.forward, *halves, "silu"),
        "swiglu backward F=14336 with h": _call(glu.backward, *[torch.empty(8, 14336, dtype=dtype)] * 3, "silu", True),
        "geglu tanh forward F=14336": _call(glu.forward, *[torch.empty(8, 14336, dtype=dtype)] * 2, "gelu_tanh"),
        "geglu tanh backward F=14336": _call(
            glu.backward, *[torch.empty(8, 14336, dtype=dtype)] * 3, "gelu_tanh", False
        ),
        "geglu exact forward F=14336": _call(glu.forward, *[torch.empty(8, 14336, dtype=dtype)] * 2, "gelu"),
        "geglu exact backward F=14336": _call(glu.backward, *[torch.empty(8, 14336, dtype=dtype)] * 3, "gelu", False),
    }
    for q_heads, k_heads, width in ((32, 8, 128), (64, 8, 128), (32, 8, 64), (9, 3, 64)):
        # [B, heads, T, D] as attention layers hand it over: a transposed view of [B, T, heads, D].
        q, k = (torch.empty(2, 64, heads, width, dtype=dtype).transpose(1, 2) for heads in (q_heads, k_heads))
        angles, table = torch.empty(2, 64, width, dtype=dtype), torch.empty(4096, width, dtype=dtype)
        positions = torch.empty(2, 64, dtype=torch.int64)
        name = f"rope q{q_heads} k{k_heads} D={width}"
        calls[name] = _call(rope.launch, q, k, angles, angles, None, False)
        calls[f"{name} one row of angles"] = _call(rope.launch, q, k, angles[:1], angles[:1], None, False)
        calls[f"{name} positions backward"] = _call(rope.launch, q, k, table, table, positions, True)
    return calls


def _losses(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    labels, stat = torch.empty(8, dtype=torch.int64), torch.empty(8)
    for vocab in (32000, 128256, 151936, 262144):
        z = torch.empty(8, vocab, dtype=dtype)
        logp_only = (stat, None, None)
        calls |= {
            f"loss statistics V={vocab}": _call(loss.stats, z, labels, None, 1.0, False, False),
            f"loss gradient V={vocab}": _call(loss.gradient, z, labels, stat, stat, None, logp_only, None, 1.0, out=z),
        }
    everything = (stat, stat, stat)
    calls |= {
        "loss statistics V=262144 softcap entropy argmax": _call(loss.stats, z, labels, 30.0, 1.0, True, True),
        "loss gradient V=262144 softcap entropy": _call(
            loss.gradient, z, labels, stat, stat, stat, everything, 30.0, 1.0, out=z
        ),
    }
    return calls


def _weights(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    numel = 14336 * 4096
    packed, code = torch.empty(numel // 2, dtype=torch.uint8), torch.empty(16)
    absmax, q_absmax = torch.empty(numel // 64), torch.empty(numel // 64, dtype=torch.uint8)
    absmax2, code2, offset = torch.empty(numel // 64 // 256), torch.empty(256), torch.empty(())
    size = dict(shape=(14336, 4096), dtype=dtype, blocksize=64, blocksize2=256)
    p, state, am = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=torch.uint8), torch.empty(numel // 256)
    plain = (packed, absmax, code, None, None, None)
    nested = (packed, q_absmax, code, code2, absmax2, offset)
    adam = (p, p, state, state, am, am, code2, code2, 1e-4, 0.9, 0.999, 1e-8, 0.01, 1, 1.0, 256)
    return {
        "nf4_dequantize 4096x14336": _call(nf4.dequantize, *plain, **size),
        "nf4_dequantize 4096x14336 double": _call(nf4.dequantize, *nested, **size),
        "adamw8bit_step": _call(adamw8bit.step, *adam),
    }


def _call(function: Callable, *args, **kwargs) -> Callable[[], object]:
    return lambda: function(*args, **kwargs)
