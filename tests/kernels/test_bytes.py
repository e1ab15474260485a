"""Bytes, races and addresses of every Triton kernel, from traces of the interpreter.

The counts are those of the docstrings of `norms`, `rope`, `glu`, `loss`, `nf4` and `adamw8bit`: each input once, each
output once. Where programs ask for something more than once (a norm's weight, a table), the issued bytes are stated
too.
"""

import random
from collections.abc import Callable

import pytest
import torch
from trebuchet.kernels import functional as K
from trebuchet.kernels import launch_table
from trebuchet.kernels.trace import LaunchTrace, trace
from trebuchet.kernels.triton_kernels import adamw8bit, glu, layer_norm, loss, nf4, rms_norm, rope, wide_norm

N, H, W, V, S = 24, 1000, 17000, 9000, 2  # rows, width, a wide one, vocabulary, bytes of fp16


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def nf4_weight(rows: int, columns: int) -> tuple:
    blocks = rows * columns // 64
    return (
        torch.randint(0, 256, (rows * columns // 2,)).byte(), torch.randint(0, 256, (blocks,)).byte(), torch.randn(16),
        torch.randn(256), torch.rand(-(-blocks // 256)), torch.rand(()),
    )  # fmt: skip


def calls() -> dict[str, tuple[Callable[[], object], int, int, int | None]]:
    """{name: (call, unique bytes read, unique bytes written, issued bytes read or None where equal to unique)}."""
    torch.manual_seed(0)
    x, r, w, stat = half(N, H), half(N, H), half(H), torch.rand(N)
    labels, z, g = torch.randint(0, V, (N,)), half(N, V), torch.rand(N)
    wx, wr, ww, wide = half(3, W), half(3, W), half(W), 3 * W * S
    elements, weight, statistic = N * H * S, H * S, 4 * N
    row_programs = N // 2  # 1,000 columns are padded to 1,024, two rows a block of 2,048
    q, k = half(2, 12, 8, 64).transpose(1, 2), half(2, 12, 2, 64).transpose(1, 2)
    angles, table, positions = half(2, 12, 64), half(40, 64), torch.randint(0, 40, (2, 12))
    heads = 2 * 12 * 10 * 64 * S
    rows_used = len(positions.unique())
    blocks = N * -(-V // launch_table.TABLE["loss_gradient"]["block"])
    packed = nf4_weight(96, 128)
    p, grad, state, absmax, qmap = (
        half(3000),
        half(3000),
        torch.zeros(3000).byte(),
        torch.rand(12),
        torch.rand(256).sort()[0],
    )
    states = (state, state.clone(), absmax, absmax.clone())
    return {
        "rms_norm forward": (
            lambda: rms_norm.forward(x, None, w, 1e-6, 0.0, "llama", x.dtype),
            elements + weight, elements + statistic, elements + row_programs * weight,
        ),
        "add_rms_norm forward": (
            lambda: rms_norm.forward(x, r, w, 1e-6, 0.0, "llama", x.dtype),
            2 * elements + weight, 2 * elements + statistic, 2 * elements + row_programs * weight,
        ),
        "rms_norm backward frozen": (
            lambda: rms_norm.backward(x, r, w, stat, None, 0.0, "llama", False),
            2 * elements + weight + statistic, elements, 2 * elements + row_programs * weight + statistic,
        ),
        "rms_norm backward dw": (
            lambda: rms_norm.backward(x, r, w, stat, None, 0.0, "llama", True),
            2 * elements + weight + statistic, elements + row_programs * H * 4,
            2 * elements + row_programs * weight + statistic,
        ),
        "add_rms_norm backward frozen": (
            lambda: rms_norm.backward(x, r, w, stat, x.clone(), 0.0, "llama", False),
            3 * elements + weight + statistic, elements, 3 * elements + row_programs * weight + statistic,
        ),
        "layer_norm forward": (
            lambda: layer_norm.forward(x, w, w.clone(), 1e-6),
            elements + 2 * weight, elements + 2 * statistic, elements + 2 * row_programs * weight,
        ),
        "layer_norm backward dw db": (
            lambda: layer_norm.backward(x, r, w, stat, stat.clone(), True),
            2 * elements + weight + 2 * statistic, elements + 2 * row_programs * H * 4,
            2 * elements + row_programs * weight + 2 * statistic,
        ),
        # Wide rows are read twice, with dw a third time (issued; a cache that holds a row makes it once).
        "wide add_rms_norm forward": (
            lambda: wide_norm.forward(wx, wr, ww, None, 1e-6, 0.0, "llama", wx.dtype),
            3 * wide + W * S, 2 * wide + 4 * 3, 3 * wide + 3 * W * S,
        ),
        "wide layer_norm forward": (
            lambda: wide_norm.forward(wx, None, ww, ww.clone(), 1e-6, 0.0, "gemma", wx.dtype),
            wide + 2 * W * S, wide + 2 * 4 * 3, 2 * wide + 2 * 3 * W * S,
        ),
        "wide add_rms_norm backward": (
            lambda: wide_norm.backward(wx, wr, ww, None, stat[:3], wx.clone(), 0.0, "llama", False),
            3 * wide + W * S + 4 * 3, wide, 5 * wide + 2 * 3 * W * S + 4 * 3,
        ),
        "rope": (lambda: rope.launch(q, k, angles, angles.clone(), None, False), heads + 2 * 24 * 32 * S, heads, None),
        "rope positions": (
            lambda: rope.launch(q, k, table, table.clone(), positions, True),
            heads + 2 * rows_used * 32 * S + 24 * 8, heads, heads + 2 * 24 * 32 * S + 24 * 8,
        ),
        "swiglu forward": (lambda: glu.forward(x, r, "silu"), 2 * elements, elements, None),
        "swiglu forward strided": (
            lambda: glu.forward(*half(N, 2 * H).chunk(2, -1), "silu"), 2 * elements, elements, None,
        ),
        "swiglu backward": (lambda: glu.backward(x, r, x.clone(), "silu", False), 3 * elements, 2 * elements, None),
        "geglu backward with h": (
            lambda: glu.backward(x, r, x.clone(), "gelu", True), 3 * elements, 3 * elements, None,
        ),
        # The label's logit is read twice, once in the sweep, once by itself, and its gradient written twice (issued only).
        "loss statistics": (
            lambda: loss.stats(z, labels, None, 1.0, False, False), N * V * S + 8 * N, 3 * statistic,
            N * V * S + 8 * N + N * S,
        ),
        "loss gradient": (
            lambda: loss.gradient(z, labels, stat, stat.clone(), None, (g, None, None), None, 1.0, out=torch.empty_like(z)),
            N * V * S + 8 * N + 3 * statistic, N * V * S, N * V * S + N * S + blocks * (8 + 4 + 4 + 4),
        ),
        "nf4_dequantize double": (
            lambda: nf4.dequantize(*packed, (96, 128), torch.float16, 64, 256),
            # packed, absmax codes, absmax2, offset, and of both tables the levels that occur
            packed[0].numel() + packed[1].numel() + 4 + 4 + 4 * len(packed[1].unique()) + 8 * len(packed[0].unique()),
            96 * 128 * S, -1,
        ),
        "adamw8bit_step": (
            lambda: adamw8bit.step(p, grad, *states, qmap, qmap.clone(), 1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, 256),
            -1, 3000 * (S + 2) + 2 * 12 * 4, -1,
        ),
    }  # fmt: skip


def traced(call: Callable[[], object], **options) -> LaunchTrace:
    with trace(**options) as launches:
        call()
    (launch,) = launches
    return launch


@pytest.mark.parametrize("name", calls())
def test_bytes(name: str) -> None:
    call, read, written, issued = calls()[name]
    launch = traced(call)
    assert launch.written_bytes == written
    assert launch.issued_written_bytes == written + (N * S if name == "loss gradient" else 0)
    if read != -1:  # AdamW: what is read of the level tables depends on the data
        assert launch.read_bytes == read
    if issued != -1:  # NF4, AdamW: look-ups of small tables are issued per element
        assert launch.issued_read_bytes == (read if issued is None else issued)


def test_bytes_of_adamw() -> None:
    """p, g and two codes once; two absmaxes a block; and four tables of which no more than all is read."""
    launch = traced(calls()["adamw8bit_step"][0])
    streams = 3000 * (2 * S + 2) + 2 * 12 * 4
    assert streams < launch.read_bytes <= streams + 2 * 4 * (256 + 255)


@pytest.mark.parametrize("name", calls())
def test_no_races(name: str) -> None:
    """No address is written by two programs, or read by one and written by another."""
    launch = traced(calls()[name][0])
    assert len(launch.writes) > 1, "one program cannot show a race"
    assert launch.races == 0


@pytest.mark.parametrize("name", [n for n in calls() if not n.startswith("adam")])
def test_order_of_programs_does_not_matter(name: str) -> None:
    shuffled = random.Random(0)
    results = []
    for order in (None, lambda n: shuffled.sample(range(n), n)):
        with trace(order=order):
            out = calls()[name][0]()
        results.append([t for t in (out if isinstance(out, tuple) else (out,)) if t is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_order_of_programs_does_not_matter_to_adamw() -> None:
    """The one op that works in place: parameter, codes and absmaxes after the step, on states of their own."""
    torch.manual_seed(0)
    start = [half(3000), half(3000), torch.randint(0, 256, (3000,)).byte(), torch.randint(0, 256, (3000,)).byte(),
             torch.rand(12), torch.rand(12)]  # fmt: skip
    levels, shuffled, results = torch.rand(256).sort()[0], random.Random(0), []
    for order in (None, lambda n: shuffled.sample(range(n), n)):
        tensors = [t.clone() for t in start]
        with trace(order=order):
            adamw8bit.step(*tensors, levels, levels.clone(), 1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, 256)
        results.append(tensors)
    assert not torch.equal(results[0][0], start[0]) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_traces_see_a_race() -> None:
    """The instrument itself: in-place programs that overlap are reported."""
    buffer = torch.zeros(4096).half()
    rows = buffer.as_strided((3, 1024), (512, 1))  # rows that overlap by half
    labels, zeros, ones = torch.zeros(3).long(), torch.zeros(3), torch.ones(3)
    launch = traced(lambda: loss.gradient(rows, labels, zeros, zeros, None, (ones, None, None), None, 1.0, out=rows))
    assert launch.races > 0


def test_functional_reaches_these_kernels() -> None:
    """A forward and backward pass through the public door starts one kernel each way, and counts as Triton."""
    K.reset_calls()
    x, w = half(4, 64).requires_grad_(), half(64)
    with K.force_backend("triton"), trace() as launches:
        K.rms_norm(x, w, 1e-6).sum().backward()
    assert [launch.kernel for launch in launches] == ["rms_norm._forward", "rms_norm._backward"]
    assert K.calls() == {"rms_norm": {"triton": 1}, "rms_norm_backward": {"triton": 1}}
