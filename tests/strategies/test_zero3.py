"""ZeRO-3 on gloo ranks through the product's own session: losses of one process, bytes per rank, exports, checkpoints, no compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trebuchet.launcher import api
from trebuchet.strategies import zero3

from .conftest import Run, not_repacked, same_as_exported

# fp32, sums over ranks in another order, six AdamW steps at 1e-3: 5e-8 to 3e-6 was seen.
FP32 = 1e-5
SMALL_FILES = 100_000  # bytes; the exported model is several times that
METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"r": 4}},
    "qlora": {"method": "qlora", "lora": {"r": 4}},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, optimizer on the host": ("full", {"chosen": {"offload": "optimizer"}}),
    "full, parameters on the host": ("full", {"chosen": {"offload": "params"}}),
    "lora, parameters on the host": ("lora", {"chosen": {"offload": "params"}}),
    "qlora, parameters on the host": ("qlora", {"chosen": {"offload": "params"}}),
    "full, checkpointing full": ("full", {"strategy": {"checkpointing": "full"}}),
    "lora, checkpointing selective": ("lora", {"strategy": {"checkpointing": "selective"}}),
}


def cell(method: str, **more: Any) -> dict[str, Any]:
    strategy = {**METHODS[method], "parallel": "zero3", **more.pop("strategy", {})}
    return {"strategy": strategy, "evaluate": "steps" not in more, **more}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_cells: Run) -> dict[str, list[dict[str, Any]]]:
    one = {f"one {m}": {"strategy": {**METHODS[m], "parallel": "none"}} for m in METHODS}
    two = {m: cell(m, export=True, save=[6]) for m in METHODS}
    two["full"]["shard_bytes"] = SMALL_FILES
    two["lora"]["top"] = {"evaluation": {"forgetting": 1}}  # the base answers, a forward pass a token
    two |= {name: cell(method, **change) for name, (method, change) in VARIANTS.items()}
    two["bf16"] = cell("full", top={"model": {"dtype": "bf16"}})
    one["one bf16"] = {"strategy": {**METHODS["full"], "parallel": "none"}, "top": {"model": {"dtype": "bf16"}}}
    two["left out"] = cell("full", leave_out=True)
    two["fsdp2 qlora"] = {"strategy": {**METHODS["qlora"], "parallel": "fsdp2"}}
    for method in ("full", "lora"):
        dropout = {"lora": {"r": 4, "dropout": 0.2}} if method == "lora" else {}
        two[f"{method} saved"] = cell(method, strategy=dropout, steps=[0, 6], save=[3])
        two[f"{method} resumed"] = {**cell(method, strategy=dropout, steps=[3, 6]), "from": f"{method} saved"}
    groups: list[dict[str, Any]] = [
        {"world": 1, "name": "one", "cells": one},
        {"world": 2, "name": "two", "cells": two},
    ]
    for i, world in enumerate((2, 3, 1)):
        where = {"steps": [2 * i, 2 * i + 2], "save": [2 * i + 2]}
        parts = {f"{m} {i}": {**cell(m, **where), "from": f"{m} moved"} for m in ("full", "lora")}
        groups.append({"world": world, "name": f"part{i}", "cells": parts})
    return run_cells(tmp_path_factory.mktemp("zero3"), groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_losses_and_norms_are_those_of_one_process(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    method = VARIANTS[name][0] if name in VARIANTS else name
    one, (first, second) = found[f"one {method}"][0], found[name]
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    assert first["tokens"] == one["tokens"]
    assert first["losses"] == pytest.approx(one["losses"], rel=FP32)
    assert first["norms"] == pytest.approx(one["norms"], rel=10 * FP32)
    assert first["losses"][-1] < first["losses"][0]
    assert first["kernels"] == one["kernels"] and set(first["calls"]) == set(one["calls"])


@pytest.mark.slow
def test_bf16_trains_as_one_process_within_its_rounding(found: dict[str, list[dict[str, Any]]]) -> None:
    """One process keeps fp32 weights and rounds in every product, DeepSpeed keeps bf16 ones beside an fp32 copy."""
    assert found["bf16"][0]["losses"] == pytest.approx(found["one bf16"][0]["losses"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "bf16", "qlora, parameters on the host"])
def test_each_rank_keeps_its_half(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    for when in ("before", "after"):
        for rank in found[name]:
            seen = rank if when == "before" else rank["after_evaluation"]
            small = 2 * 2 * 64 * 5 * 4  # five norms of 64, at most twice
            assert seen["whole_bytes"] / 2 <= seen["local_bytes"] <= seen["whole_bytes"] / 2 + small
    if name.startswith("qlora"):
        packed = found[name][0]["packed_bytes"]
        matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
        assert (
            packed == (matrices // 2 + matrices // 64) // 2
        )  # half a byte a weight and a byte of scale a block, halved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qlora", "qlora, parameters on the host"])
def test_gathered_bytes_are_those_of_fsdp2(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Whose packed weights and scales test_matrix.py compares with bitsandbytes', after steps and an evaluation as here."""
    wanted = found["fsdp2 qlora"][0]["frozen_bytes"]
    assert wanted and found[name][0]["frozen_bytes"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_opens_with_equal_logits(found: dict[str, list[dict[str, Any]]], method: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = Path(found[method][0]["model"])
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if method == "full":
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert sorted(set(index.values())) == names and len(names) > 3
    else:
        assert names == ["adapter_model.safetensors"]
    opened = not_repacked(AutoModelForCausalLM.from_pretrained(folder, **options))
    with torch.no_grad():
        logits = opened(input_ids=torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt"), rtol=1e-4, atol=1e-4)  # fp32, other kernels


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_process_reads_the_trained_weights_of_every_checkpoint(
    found: dict[str, list[dict[str, Any]]], method: str, tiny_model: Path
) -> None:
    same_as_exported(found[method][0], tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_ranks_go_on_to_the_bit(found: dict[str, list[dict[str, Any]]], method: str) -> None:
    for whole, resumed in zip(found[f"{method} saved"], found[f"{method} resumed"], strict=True):
        for key in ("losses", "norms", "tokens"):
            assert resumed[key] == whole[key][3:], key
        assert len(set(whole["losses"])) == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_ranks_go_on_to_rounding(found: dict[str, list[dict[str, Any]]], method: str) -> None:
    """2 -> 3 -> 1; under LoRA the frozen base comes from its own files and not from the checkpoint."""
    whole = found[f"one {method}"][0]
    for i, world in enumerate((2, 3, 1)):
        part = found[f"{method} {i}"]
        assert len(part) == world
        assert part[0]["losses"] == pytest.approx(whole["losses"][2 * i : 2 * i + 2], rel=FP32), world


@pytest.mark.slow
def test_parameters_that_are_left_whole_stop_the_run(found: dict[str, list[dict[str, Any]]]) -> None:
    """DeepSpeed's own threshold of 100,000 elements is more than any matrix of this model has."""
    for rank in found["left out"]:
        assert "parameters are not sharded over 2 ranks: model.embed_tokens.weight" in rank["error"]
        assert "and the plan counts on" in rank["error"]


def test_every_default_that_bites_is_named() -> None:
    plan = api.plan(
        {
            "model": "meta-llama/Llama-3.1-70B",
            "data": "t",
            "strategy": {"method": "full", "parallel": "zero3", "offload": "optimizer"},
            "optimization": {"global_batch_size": 64},
        },
        cluster="a100-80gb-16",
    )
    assert plan.chosen is not None
    found = zero3.settings(plan.chosen, 8192)
    assert found["gradient_clipping"] == 0.0 and found["bf16"]["enabled"] is True
    assert found["zero_allow_untested_optimizer"] is True and found["zero_force_ds_cpu_optimizer"] is False
    assert (
        found["train_batch_size"] == found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * 16
    )
    zero = found["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True} and "offload_param" not in zero
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "sub_group_size")
    assert all(isinstance(zero[name], int) and zero[name] > 0 for name in buckets)
    assert zero["stage3_param_persistence_threshold"] < 8192 * 1024  # no matrix of this model stays whole


def test_checkpoints_of_other_layouts_are_refused_with_a_sentence(tmp_path: Path) -> None:
    from trebuchet.strategies import sharded_states, zero3_states
    from trebuchet.strategies.layouts import LayoutError

    model = torch.nn.Linear(2, 2)
    with pytest.raises(LayoutError, match="was not written under ZeRO-3"):
        zero3_states.load(model, None, tmp_path)
    (tmp_path / "zero3-0-of-2.safetensors").touch()
    with pytest.raises(LayoutError, match=r"written under ZeRO-3.*resume with strategy\.parallel zero3"):
        sharded_states.load(tmp_path, model, torch.optim.AdamW(model.parameters()))
