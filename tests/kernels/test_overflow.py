"""Addresses beyond 2^31 elements: the last program of a huge launch is run alone, computing addresses but touching
nothing.

The tensors are virtual: torch.empty reserves address space that is never written.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from trebuchet.kernels.launch_table import TABLE
from trebuchet.kernels.trace import trace
from trebuchet.kernels.triton_kernels import adamw8bit, glu, layer_norm, loss, nf4, rms_norm, rope, wide_norm
from trebuchet.kernels.triton_kernels.launch import Launch, record

BIG = 2**31
TWO_KERNELS = ("wide add_rms_norm backward", "wide layer_norm backward")  # dx, and dw from programs of their own


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def launches() -> dict[str, Callable[[], object]]:
    rows = BIG // 4096 + 5
    x, w, stat = empty(rows, 4096), empty(4096), empty(rows, dtype=torch.float32)
    wide_rows = BIG // 32768 + 5
    wx, ww, wide_stat = empty(wide_rows, 32768), empty(32768), empty(wide_rows, dtype=torch.float32)
    vocab = 262144
    logits_rows = BIG // vocab + 3
    z, labels, lse = (
        empty(logits_rows, vocab),
        empty(logits_rows, dtype=torch.int64),
        empty(logits_rows, dtype=torch.float32),
    )
    q, k = (empty(1, 524293, heads, 128).transpose(1, 2) for heads in (32, 2))
    angles = empty(1, 524293, 128)
    far = empty(1, 33, 524293, 128)[:, :, :64]  # [B, heads, T, D]: the last head begins at 2^31
    code = empty(256, dtype=torch.float32)
    numel = BIG + 512
    big, small = empty(numel // 2, dtype=torch.uint8), empty(numel // 64, dtype=torch.float32)
    p, state = empty(numel), empty(numel, dtype=torch.uint8)
    absmax = empty(numel // 256, dtype=torch.float32)
    return {
        "rms_norm forward": lambda: rms_norm.forward(x, x, w, 1e-6, 0.0, "llama", x.dtype),
        "rms_norm backward": lambda: rms_norm.backward(x, x, w, stat, x, 0.0, "llama", True),
        "layer_norm forward": lambda: layer_norm.forward(x, w, w, 1e-6),
        "layer_norm backward": lambda: layer_norm.backward(x, x, w, stat, stat, True),
        "wide add_rms_norm forward": lambda: wide_norm.forward(wx, wx, ww, None, 1e-6, 0.0, "llama", wx.dtype),
        "wide layer_norm forward": lambda: wide_norm.forward(wx, None, ww, ww, 1e-6, 0.0, "gemma", wx.dtype),
        "wide add_rms_norm backward": lambda: wide_norm.backward(wx, wx, ww, None, wide_stat, wx, 0.0, "llama", True),
        "wide layer_norm backward": lambda: wide_norm.backward(
            wx, wx, ww, wide_stat, wide_stat, None, 0.0, "gemma", True
        ),
        "swiglu forward": lambda: glu.forward(x, x, "silu"),
        "swiglu backward strided": lambda: glu.backward(x[:, :2048], x[:, 2048:], x[:, 2048:], "silu", True),
        "rope heads first": lambda: rope.launch(far, k[:, :, :64], angles[:, :64], angles[:, :64], None, False),
        "rope": lambda: rope.launch(q, k, angles, angles, None, False),
        "loss statistics": lambda: loss.stats(z, labels, None, 1.0, False, False),
        "loss gradient": lambda: loss.gradient(z, labels, lse, lse, None, (lse, None, None), None, 1.0, out=z),
        "nf4_dequantize": lambda: nf4.dequantize(
            big, small, code[:16], None, None, None, (numel,), torch.float16, 64, 256
        ),
        "adamw8bit_step": lambda: adamw8bit.step(
            p, p, state, state, absmax, absmax, code, code, 1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, 256
        ),
    }


@pytest.mark.parametrize("name", list(launches()))
def test_last_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("rms_norm_backward", "layer_norm_backward"):  # eight rows a program, not two thousand
        monkeypatch.setitem(TABLE[kernel], "programs_dw", 65536)
    monkeypatch.setitem(TABLE["wide_norm"], "shares", 2048)
    with record() as recorded:
        launches()[name]()
    assert len(recorded) == (2 if name in TWO_KERNELS else 1)
    for launch in recorded:
        _last_program_stays_inside(launch)


def _last_program_stays_inside(launch: Launch) -> None:
    programs = launch.grid[0]
    tensors = [a for a in launch.args if isinstance(a, torch.Tensor) and a.numel()]
    with trace(only=(programs - 1, programs), touch=False) as traces:
        launch.kernel[(1,)](*launch.args, **launch.options)
    accesses = [*traces[0].reads, *traces[0].writes]
    touched = np.concatenate([a.ravel() for part in accesses for a in part.addresses])
    spans = [(t.data_ptr(), t.data_ptr() + _span(t) * t.element_size()) for t in tensors]
    inside = np.zeros(touched.shape, bool)
    for low, high in spans:
        inside |= (touched >= low) & (touched < high)
    assert inside.all(), f"{(~inside).sum()} of {len(touched)} addresses are outside every tensor"
    for tensor, (low, high) in zip(tensors, spans, strict=True):
        if _span(tensor) >= BIG:
            last = touched[(touched >= low) & (touched < high)].max()
            assert int(last) - low > (BIG - 1) * tensor.element_size(), "the last program stays below 2^31 elements"


def _span(t: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
