"""Speed by arithmetic: FLOPs by hand, published speeds within the stated range, the direction of every effect."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.strategies.memory_request import LINEARS, MemoryRequest, ModelDims
from trebuchet.strategies.throughput import TABLE, Hardware, estimate, flops_per_token

DATA = Path(__file__).resolve().parent / "data" / "throughput.csv"
A100 = Hardware(peak_flops=312e12, memory_bandwidth=2.039e12, intra_node_bandwidth=300e9, inter_node_bandwidth=25e9)
LLAMA_8B = ModelDims(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
FULL = MemoryRequest(
    model=LLAMA_8B, precision="bf16-mixed", parallel="fsdp2", gpus=8, micro_batch=4, checkpointing="none"
)
LORA = replace(FULL, method="lora", lora_r=16, lora_targets=LINEARS, parallel="none", gpus=1)


def published() -> list[tuple[dict[str, str], MemoryRequest, Hardware]]:
    """The rows of throughput.csv as requests."""
    found = []
    with DATA.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            names = (
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "vocab_size",
            )
            request = MemoryRequest(
                model=ModelDims(**{name: int(row[name]) for name in names}),
                method=row["method"],
                lora_r=int(row["lora_r"]) if row["lora_r"] else None,
                lora_targets=tuple(row["lora_targets"].split(",")) if row["lora_targets"] else None,
                precision=row["precision"],
                parallel=row["parallel"],
                gpus=int(row["gpus"]),
                seq_len=int(row["seq_len"]),
                micro_batch=int(row["micro_batch"]),
                grad_accum=int(row["grad_accum"]),
                checkpointing=row["checkpointing"],
            )
            hardware = Hardware(
                peak_flops=float(row["peak_tflops"]) * 1e12,
                memory_bandwidth=float(row["memory_gbps"]) * 1e9,
                intra_node_bandwidth=float(row["intra_gbps"]) * 1e9,
                inter_node_bandwidth=float(row["inter_gbps"]) * 1e9,
            )
            found.append((row, request, hardware))
    return found


def test_published_speeds_lie_in_the_stated_range() -> None:
    """All but two of 30 rows of two stacks; the central value is right on average within 15 %."""
    inside, ratios = 0, []
    for row, request, hardware in published():
        found = estimate(request, hardware)
        low, high = found.tokens_per_s_range
        measured = float(row["tokens_per_s_per_gpu"]) * request.gpus
        inside += low <= measured <= high
        ratios.append(math.log(found.tokens_per_s / measured))
    assert len(ratios) == 30
    assert inside >= 28
    assert abs(sum(ratios) / len(ratios)) <= math.log(1.15)
    assert max(map(abs, ratios)) <= math.log(2)


def test_full_training_is_six_flops_a_weight_and_attention() -> None:
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # without the embedding look-up and the norms
    model, machine = flops_per_token(FULL)
    attention = 3 * 2 * 32 * 4096 * 2048
    assert model == machine == 6 * weights + attention


def test_a_frozen_base_has_no_weight_gradient() -> None:
    full, _ = flops_per_token(replace(FULL, parallel="none", gpus=1))
    frozen, _ = flops_per_token(replace(LORA, lora_r=1))
    assert frozen / full == pytest.approx(4 / 6, rel=0.02)


def test_checkpointing_repeats_the_blocks_and_not_the_head() -> None:
    head = 2 * 128256 * 4096
    model, machine = flops_per_token(replace(FULL, checkpointing="full"))
    assert machine - model == pytest.approx(model / 3 - head)
    ours = flops_per_token(replace(FULL, checkpointing="full", kernels="trebuchet"))[1]
    assert ours - machine == head


def test_experts_cost_what_is_active() -> None:
    moe = replace(LLAMA_8B, num_experts=8, experts_per_token=2)
    dense, sparse = (flops_per_token(replace(FULL, model=m))[0] for m in (LLAMA_8B, moe))
    assert sparse - dense == 6 * 32 * 3 * 4096 * 14336


def test_every_effect_has_its_direction() -> None:
    speed = estimate(FULL, A100).tokens_per_s
    assert estimate(replace(FULL, checkpointing="full"), A100).tokens_per_s < speed
    assert estimate(replace(FULL, checkpointing="full", offload="params"), A100).tokens_per_s < speed
    assert estimate(FULL, replace(A100, peak_flops=989e12)).tokens_per_s > speed
    slow = estimate(FULL, replace(A100, intra_node_bandwidth=5e9))
    assert slow.tokens_per_s < speed
    assert slow.seconds["communication"] > slow.seconds["compute"]
    qlora = replace(LORA, method="qlora")
    assert estimate(qlora, A100).tokens_per_s < estimate(LORA, A100).tokens_per_s
    assert (
        estimate(replace(LORA, seq_len=64), A100).tokens_per_s
        < estimate(replace(LORA, seq_len=4096), A100).tokens_per_s
    )


def test_accumulation_spreads_the_step_but_not_more() -> None:
    one = estimate(replace(FULL, parallel="ddp", micro_batch=1), A100)
    many = estimate(replace(FULL, parallel="ddp", micro_batch=1, grad_accum=16), A100)
    assert one.tokens_per_s < many.tokens_per_s
    assert many.seconds["compute"] == pytest.approx(16 * one.seconds["compute"])
    assert many.seconds["optimizer"] == one.seconds["optimizer"]


def test_hours_and_price() -> None:
    found = estimate(FULL, A100)
    assert found.hours(10**9) == pytest.approx(10**9 / found.tokens_per_s / 3600)
    shortest, longest = found.hours_range(10**9)
    assert shortest < found.hours(10**9) < longest
    assert found.price(10**9, gpus=8, per_gpu_hour=1.5) == pytest.approx(found.hours(10**9) * 12)
    assert 0 < found.mfu < 1


def test_constants_say_where_they_come_from() -> None:
    for name, entry in TABLE.items():
        assert entry["how"] in ("derived", "measured", "fitted", "default", "assumed"), name
        assert len(entry["from"]) > 20, name


def test_a_peak_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="peak_flops"):
        Hardware(peak_flops=0)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["none", "ddp", "fsdp1", "fsdp2", "zero2", "zero3"]),
    st.sampled_from([1, 2, 8, 16, 1024]),
    st.sampled_from(["none", "optimizer", "params"]),
    st.integers(1, 100_000),
    st.integers(1, 32),
)
def test_speed_is_positive_ordered_and_below_the_peak(
    parallel: str, gpus: int, offload: str, seq_len: int, micro: int
) -> None:
    r = replace(FULL, parallel=parallel, gpus=gpus, offload=offload, seq_len=seq_len, micro_batch=micro)
    found = estimate(r, A100)
    low, high = found.tokens_per_s_range
    assert 0 < low <= found.tokens_per_s <= high
    assert 0 < found.mfu < 1
    assert all(value >= 0 for value in found.seconds.values())
