"""What must hold for every request, drawn at random: the order of methods, layouts, checkpointing and kernels, and clear refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.strategies.memory import MemoryRequest, estimate
from trebuchet.strategies.memory_request import ALLOWED, LINEARS, ModelDims
from trebuchet.strategies.memory_states import states

SHAPES = (
    (896, 4864, 24, 14, 2, 64, 151936),
    (4096, 14336, 32, 32, 8, 128, 128256),
    (8192, 28672, 80, 64, 8, 128, 32000),
)


@st.composite
def runs(draw: Any) -> MemoryRequest:
    """Requests that this project plans: its kernels or none, layouts it has, shapes of published models."""
    h, f, layers, heads, kv, dim, vocab = draw(st.sampled_from(SHAPES))
    model = ModelDims(
        hidden_size=h, intermediate_size=f, num_layers=layers, num_heads=heads, num_kv_heads=kv, head_dim=dim,
        vocab_size=vocab, tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    return MemoryRequest(
        model=model,
        precision=draw(st.sampled_from(["bf16-mixed", "fp16-mixed", "fp32"])),
        parallel=draw(st.sampled_from(["none", "ddp", "fsdp2", "zero3"])),
        gpus=draw(st.sampled_from([1, 2, 8, 64])),
        seq_len=draw(st.integers(1, 65536)),
        micro_batch=draw(st.integers(1, 32)),
        packed=draw(st.booleans()),
        checkpointing=draw(st.sampled_from(ALLOWED["checkpointing"])),
        attention=draw(st.sampled_from(["flash", "sdpa"])),
        kernels=draw(st.sampled_from(["none", "trebuchet"])),
        lora_r=draw(st.integers(1, 128)),
        lora_targets=LINEARS,
        lora_dropout=0.0,
        method=draw(st.sampled_from(["full", "lora", "qlora"])),
        grad_accum=draw(st.sampled_from([1, 4])),
    )


def peak(r: MemoryRequest, **changes: Any) -> int:
    return estimate(replace(r, **changes)).peak_allocated_bytes


@settings(max_examples=80, deadline=None)
@given(runs())
def test_every_request_is_answered_with_finite_positive_numbers(r: MemoryRequest) -> None:
    found = estimate(r).to_json()
    numbers = [found[key] for key in ("peak_allocated_gib", "peak_reserved_gib", "process_gib", "host_gib")]
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    assert all(math.isfinite(x) and x >= 0 for part in ("phases", "components") for x in found[part].values())


@settings(max_examples=80, deadline=None)
@given(runs(), st.sampled_from(["fsdp2", "zero3"]), st.sampled_from([2, 8, 64]))
def test_more_ranks_never_cost_more_per_gpu(r: MemoryRequest, parallel: str, ranks: int) -> None:
    assert peak(r, parallel=parallel, gpus=2 * ranks) <= peak(r, parallel=parallel, gpus=ranks)


@settings(max_examples=80, deadline=None)
@given(runs())
def test_a_smaller_base_weighs_less(r: MemoryRequest) -> None:
    """With this project's kernels: without them PEFT widens the embedding of a 4-bit base to fp32 when computing in fp16."""
    r = replace(r, kernels="trebuchet")
    weights = [states(replace(r, method=method)).weights for method in ("qlora", "lora", "full")]
    assert weights == sorted(weights)


@settings(max_examples=80, deadline=None)
@given(runs())
def test_more_checkpointing_never_costs_more(r: MemoryRequest) -> None:
    """But for one block's boundary tensors and the packed mask that all recomputing blocks read."""
    full, some, none = (peak(r, checkpointing=kind) for kind in ("full", "selective", "none"))
    slack = 2 * r.tokens * r.model.hidden_size * 4
    assert full <= some + slack and some <= none + slack + r.micro_batch * r.seq_len**2


@settings(max_examples=80, deadline=None)
@given(runs())
def test_our_kernels_never_cost_more_than_none(r: MemoryRequest) -> None:
    """Where rows are long enough for logits to matter; below, the head's fp32 gradient buffer can weigh more than they do."""
    r = replace(r, attention="flash", seq_len=max(r.seq_len, 2048))
    assert peak(r, kernels="trebuchet") <= peak(r, kernels="none")


@settings(max_examples=60, deadline=None)
@given(
    runs(),
    st.sampled_from([*ALLOWED, "gpus", "seq_len", "micro_batch", "grad_accum"]),
    st.sampled_from(["x", -1, 0, 1.5, True]),
)
def test_bad_values_are_refused_in_one_paragraph(r: MemoryRequest, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        replace(r, **{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("offload_ranks", [1, 2])
def test_weights_on_the_host_still_pass_through_the_gpu(offload_ranks: int) -> None:
    """Also on one GPU, where nothing is gathered: the head arrives whole, beside the buffer that it came in."""
    h, f, layers, heads, kv, dim, vocab = SHAPES[1]
    model = ModelDims(
        hidden_size=h,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=dim,
        vocab_size=vocab,
    )
    r = MemoryRequest(
        model=model, method="lora", lora_r=8, lora_targets=LINEARS, precision="bf16-mixed", parallel="fsdp2",
        offload="params", gpus=offload_ranks, seq_len=64, kernels="trebuchet",
    )  # fmt: skip
    assert estimate(r).phases["forward_backward"] > 2 * 2 * model.head_params
