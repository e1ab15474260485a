"""The memory estimate by hand-computed cases, by properties that must hold everywhere, and at its edges."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.strategies.memory import GIB, MemoryRequest, ModelDims, estimate, needs
from trebuchet.strategies.memory_constants import TABLE
from trebuchet.strategies.memory_request import ALLOWED, LINEARS, SHARDED
from trebuchet.strategies.memory_states import adapter_params, states

LLAMA_8B = ModelDims(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
FULL = MemoryRequest(model=LLAMA_8B)
QLORA = replace(FULL, method="qlora", lora_r=16, lora_targets=LINEARS, precision="bf16-mixed", lora_dropout=0.0)


def test_parameter_counts_are_those_of_the_published_models() -> None:
    """Totals from the safetensors indexes of the models on the Hub."""
    assert LLAMA_8B.total_params == 8_030_261_248
    mixtral = replace(LLAMA_8B, vocab_size=32000, num_experts=8, experts_per_token=2)
    assert mixtral.total_params == 46_702_792_704
    qwen = ModelDims(
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    assert qwen.total_params == 494_032_768


def test_sixteen_bit_full_fine_tuning_is_ten_bytes_a_parameter_at_a_foreach_step() -> None:
    step = estimate(replace(FULL, optimizer="adamw-foreach")).phases["optimizer_step"]
    assert step == pytest.approx(10 * LLAMA_8B.total_params, rel=1e-3)
    fused = estimate(replace(FULL, optimizer="adamw")).phases["optimizer_step"]
    assert fused == pytest.approx(8 * LLAMA_8B.total_params, rel=1e-3)


@pytest.mark.parametrize(("parallel", "width"), [("fsdp1", 20), ("fsdp2", 20)])
def test_mixed_precision_under_fsdp_is_twenty_bytes_over_the_shards(parallel: str, width: int) -> None:
    r = replace(FULL, precision="bf16-mixed", optimizer="adamw-foreach", parallel=parallel, gpus=4)
    s = states(r)
    assert s.weights + s.gradients + s.optimizer + s.step_temporary == pytest.approx(
        width * 8_030_261_248 / 4, rel=1e-6
    )


def test_zero3_is_sixteen_bytes_over_the_shards_between_steps() -> None:
    s = states(replace(FULL, precision="bf16-mixed", parallel="zero3", gpus=8))
    assert s.weights + s.gradients + s.optimizer == pytest.approx(16 * 8_030_261_248 / 8, rel=1e-6)


def test_nf4_is_half_a_byte_and_its_absmax() -> None:
    linear, rest = 6_979_321_856, 1_050_939_392
    assert states(QLORA).weights == int(linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + rest * 2)
    assert states(replace(QLORA, double_quant=False)).weights == int(linear * (0.5 + 4 / 64) + rest * 2)


def test_adapters_are_rank_times_in_plus_out() -> None:
    assert adapter_params(replace(QLORA, lora_targets=("q",))) == 32 * 16 * (4096 + 4096)
    assert adapter_params(replace(QLORA, lora_targets=("lm_head",))) == 16 * (4096 + 128256)


def test_offload_moves_state_to_the_host() -> None:
    here = replace(FULL, precision="bf16-mixed", parallel="zero3", gpus=8)
    there = replace(here, offload="optimizer")
    assert states(there).optimizer == 0
    assert states(there).host == states(here).optimizer
    assert estimate(there).peak_allocated_bytes < estimate(here).peak_allocated_bytes
    assert estimate(there).host_bytes > estimate(here).host_bytes


def test_accumulation_keeps_gradients_through_forward() -> None:
    """At the loss a full fine-tune with accumulation holds one more copy of the trainable parameters."""
    one = replace(FULL, seq_len=8192, micro_batch=4, kernels="none")
    more = estimate(replace(one, grad_accum=2)).phases["forward_backward"]
    assert more - estimate(one).phases["forward_backward"] == states(one).gradients


def test_a_full_dpo_run_holds_a_reference_and_an_adapter_run_does_not() -> None:
    assert states(replace(FULL, objective="dpo")).weights == 2 * states(FULL).weights
    assert states(replace(QLORA, objective="dpo")).weights == states(QLORA).weights
    twice = replace(QLORA, micro_batch=2)
    assert estimate(replace(QLORA, objective="dpo")).phases == estimate(twice).phases


def test_dropout_costs_adapter_inputs_and_unstated_is_budgeted_as_on() -> None:
    off, on, unstated = (
        estimate(replace(QLORA, lora_dropout=p, kernels="fused", seq_len=8192)).peak_allocated_bytes
        for p in (0.0, 0.05, None)
    )
    assert off < on == unstated


def test_json_has_the_agreed_keys_and_parts_that_add_up() -> None:
    found = estimate(QLORA)
    shown = json.loads(json.dumps(found.to_json()))
    assert list(shown) == [
        "peak_allocated_gib", "peak_reserved_gib", "process_gib", "host_gib", "phases", "components",
    ]  # fmt: skip
    assert list(shown["phases"]) == ["load", "forward_backward", "optimizer_step", "checkpoint_save"]
    assert sum(found.components.values()) == found.process_bytes
    assert shown["peak_allocated_gib"] == pytest.approx(found.peak_allocated_bytes / GIB, abs=1e-4)


def as_json(**changes: Any) -> dict[str, Any]:
    dims = {name: getattr(LLAMA_8B, name) for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads")}
    dims |= {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False}
    base = {"model": dims, "method": "lora", "objective": "sft", "double_quant": None, "lora_r": 16,
            "lora_targets": ["q", "k", "v", "o"], "precision": "bf16-mixed", "optimizer": "adamw-foreach",
            "parallel": "none", "gpus": 1, "offload": "none", "seq_len": 4096, "micro_batch": 8, "packed": True,
            "checkpointing": "full", "attention": "flash", "kernels": "ce"}  # fmt: skip
    return {**base, **changes}


def test_a_published_run_as_a_request() -> None:
    """Row FM-215 of fms-acceleration's tables: 54.96 GiB measured."""
    assert estimate(MemoryRequest.from_dict(as_json())).peak_allocated_bytes / GIB == pytest.approx(54.96, rel=0.01)


def test_a_plan_s_word_for_accumulation_is_understood() -> None:
    assert MemoryRequest.from_dict(as_json(accumulation=8)).grad_accum == 8
    assert MemoryRequest.from_dict(as_json(grad_accum=8)).grad_accum == 8


def test_all_linear_and_comma_lists_are_targets() -> None:
    assert MemoryRequest.from_dict(as_json(lora_targets="all-linear")).lora_targets == LINEARS
    assert MemoryRequest.from_dict(as_json(lora_targets="q, v")).lora_targets == ("q", "v")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": "full"}, ["checkpoint", "did you mean checkpointing"]),
        ({"model": {**as_json()["model"], "hidden": 1}}, ["model.hidden", "model.hidden_size"]),
        ({"method": "dora"}, ["dora", "full, lora, qlora"]),
        ({"lora_r": None}, ["lora_r"]),
        ({"lora_targets": ["w1"]}, ["w1", "gate"]),
        ({"gpus": 3, "dp_replicate": 2}, ["dp_replicate (2)", "gpus (3)"]),
        ({"seq_len": 0}, ["seq_len", "0"]),
        ({"model": None}, ["model"]),
        ({"model": {"hidden_size": 8}}, ["missing", "model.num_layers"]),
    ],
)
def test_bad_requests_are_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MemoryRequest.from_dict(as_json(**change))
    for word in words:
        assert word in str(caught.value)


def test_every_constant_says_where_it_comes_from() -> None:
    for name, entry in TABLE.items():
        assert entry["how"] in ("derived", "measured", "fitted", "default", "assumed"), name
        assert len(entry["from"]) > 20, name


def test_an_estimate_is_a_few_hundred_calls() -> None:
    """The planner weighs thousands; seconds are measured by benchmarks/planner.py, because a busy machine has others."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        estimate(QLORA)
    finally:
        sys.setprofile(None)
    assert calls < 400


def test_importing_the_estimate_loads_nothing_heavy() -> None:
    code = "import sys, trebuchet.strategies.memory; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@st.composite
def requests(draw: Any) -> MemoryRequest:
    """Any request the types allow."""
    heads = draw(st.sampled_from([1, 2, 4, 8, 32]))
    experts = draw(st.sampled_from([None, 4, 8]))
    model = ModelDims(
        hidden_size=draw(st.sampled_from([64, 576, 4096, 8192])),
        intermediate_size=draw(st.sampled_from([64, 1536, 14336])),
        num_layers=draw(st.integers(1, 80)),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4, 8, 32) if n <= heads])),
        head_dim=draw(st.sampled_from([64, 128])),
        vocab_size=draw(st.sampled_from([257, 32000, 151936])),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=experts,
        experts_per_token=experts and draw(st.sampled_from([1, 2, 4])),
    )
    chosen = {name: draw(st.sampled_from(values)) for name, values in ALLOWED.items()}
    adapters = chosen["method"] != "full"
    return MemoryRequest(
        model=model,
        **chosen,
        double_quant=draw(st.sampled_from([None, True, False])),
        lora_r=draw(st.integers(1, 128)) if adapters else None,
        lora_targets=tuple(draw(st.sets(st.sampled_from([*LINEARS, "lm_head"]), min_size=1))) if adapters else None,
        lora_dropout=draw(st.sampled_from([None, 0.0, 0.1])),
        gpus=draw(st.sampled_from([1, 2, 8, 64])),
        seq_len=draw(st.integers(1, 200_000)),
        micro_batch=draw(st.integers(1, 64)),
        grad_accum=draw(st.sampled_from([1, 4])),
    )


@settings(max_examples=150, deadline=None)
@given(requests())
def test_the_peak_is_the_highest_phase_and_nothing_is_negative(r: MemoryRequest) -> None:
    found = estimate(r)
    assert found.peak_allocated_bytes == max(found.phases.values())
    assert needs(r) == (found.peak_allocated_bytes, found.process_bytes, found.host_bytes)
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes
    assert found.process_bytes > found.peak_allocated_bytes
    assert found.host_bytes > 0
    assert min(*found.phases.values(), *found.components.values()) >= 0
    assert sum(found.components.values()) == found.process_bytes
    assert all(isinstance(value, int) for value in (*found.phases.values(), *found.components.values()))


@settings(max_examples=150, deadline=None)
@given(requests(), st.sampled_from(["seq_len", "micro_batch", "layers"]), st.integers(1, 8))
def test_more_of_anything_never_costs_less(r: MemoryRequest, what: str, by: int) -> None:
    if what == "layers":
        larger = replace(r, model=replace(r.model, num_layers=r.model.num_layers + by))
    else:
        larger = replace(r, **{what: getattr(r, what) + by})
    small, large = estimate(r), estimate(larger)
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes"):
        assert getattr(large, name) >= getattr(small, name)
    for phase, value in small.phases.items():
        assert large.phases[phase] >= value


@settings(max_examples=150, deadline=None)
@given(requests(), st.integers(1, 64), st.sampled_from([1, 4]))
def test_another_micro_batch_of_a_run_is_that_run_made_anew(r: MemoryRequest, micro: int, accumulation: int) -> None:
    """Whether the first one was estimated before the other or not: what the two share depends on neither."""
    anew = estimate(replace(r, micro_batch=micro, grad_accum=accumulation))
    assert estimate(r.at(micro, accumulation)) == anew
    assert estimate(replace(r)) == estimate(r) and estimate(r.at(micro, accumulation)) == anew


@settings(max_examples=150, deadline=None)
@given(requests(), st.sampled_from(SHARDED))
def test_sharding_never_adds_state(r: MemoryRequest, parallel: str) -> None:
    """Against the same layout on half the GPUs: what is cut gets smaller, what is whole stays."""
    r = replace(r, parallel=parallel, gpus=64)
    wide, narrow = states(r), states(replace(r, gpus=32))
    for name in ("weights", "adapters", "gradients", "optimizer"):
        assert getattr(wide, name) <= getattr(narrow, name)


@settings(max_examples=150, deadline=None)
@given(requests())
def test_checkpointing_saves_activations(r: MemoryRequest) -> None:
    """But for one boundary tensor, which a block keeps beside what it recomputes. FSDP1 under a frozen base holds layer
    inputs only when checkpointing, so it is left out."""
    peak = {kind: estimate(replace(r, checkpointing=kind)).peak_allocated_bytes for kind in ("none", "full")}
    if not (r.parallel == "fsdp1" and r.adapters):
        assert peak["full"] <= peak["none"] + r.tokens * r.model.hidden_size * 4


def test_an_8bit_base_keeps_its_inputs_whatever_is_checkpointed() -> None:
    """bitsandbytes holds the input of each 8-bit linear outside of what checkpointing frees: q, k and v share one, gate and up one."""
    lora8 = replace(QLORA, method="lora8", kernels="fused", checkpointing="full", micro_batch=2)
    lora = replace(lora8, method="lora")
    m = LLAMA_8B
    held = 32 * (2 * 4096 + 4096 + 14336) * 2 * lora8.tokens
    kept = {r.method: estimate(r).components["activations"] for r in (lora8, lora)}
    assert kept["lora8"] - kept["lora"] == pytest.approx(
        held, rel=0.02
    )  # the peak moves within the block by a share of one layer
    linear = m.num_layers * m.block_quantized_params
    assert states(lora).weights - states(lora8).weights == linear  # two bytes a weight against one
