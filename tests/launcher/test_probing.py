"""`plan --probe`: the formula against one step of the real model code on fake tensors, over layouts, methods and families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.cli import main
from trebuchet.launcher.cli_plan import probe_lines
from trebuchet.launcher.errors import UserError
from trebuchet.launcher.model_spec import table_config
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.probing import expected, probe
from trebuchet.strategies.fake_memory import StorageTracker
from trebuchet.training.fake_depth import DEPTHS, Timeline, at_depth
from trebuchet.training.fake_step import fake_step

SHAPES = {
    "LoRA of an 8B on one GPU": ("meta-llama/Llama-3.1-8B", "rtx4090-1", ["strategy=lora"]),
    "full 8B on 8 ranks": ("meta-llama/Llama-3.1-8B", "a100-80gb-8", []),
    "full 8B on 64 ranks": ("meta-llama/Llama-3.1-8B", "h100-64", ["optimization.global_batch_size=64"]),
    "QLoRA of an 8B on one GPU": ("meta-llama/Llama-3.1-8B", "rtx4090-1", ["strategy=qlora"]),
    "full 0.5B with tied head under DDP": ("Qwen/Qwen2.5-0.5B-Instruct", "a100-80gb-8", []),
    "LoRA of a Gemma": ("google/gemma-2b", "rtx4090-1", ["strategy=lora"]),
}


def planned(name: str, cluster: str, overrides: list[str]) -> Plan:
    return api.plan({"model": name, "data": "train.jsonl"}, cluster=cluster, overrides=overrides)


@pytest.mark.slow
def test_qlora_of_a_70b_with_parameters_on_the_host_of_two_ranks() -> None:
    forced = ["strategy.method=qlora", "strategy.parallel=fsdp2", "strategy.offload=params"]
    plan = planned("meta-llama/Llama-3.1-70B", "rtx4090-2x24gb", forced)
    assert plan.chosen is not None and plan.chosen.ranks == 2
    found = probe(plan)
    assert abs(found["difference"]) <= 0.05, found
    assert found["layers"] == 80 and found["measured_at"] == [4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_within_five_percent_of_the_probe(shape: str) -> None:
    found = probe(planned(*SHAPES[shape]))
    assert abs(found["difference"]) <= 0.05, found
    assert not any("more than 5 %" in line for line in probe_lines(found))


def tiny(tmp_path: Path, **changes: Any) -> str:
    sizes = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", **changes,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return str(tmp_path)


OTHERS = {
    "LoRA of a Gemma 2, whose scores pass through a tanh": (
        "google/gemma-2-9b-it",
        "a100-80gb-1",
        "{method: lora, checkpointing: none}",
    ),
    "full Mixtral on as many ranks as experts": (
        "mistralai/Mixtral-8x7B-v0.1",
        "h100-8",
        "{method: full, parallel: fsdp2}",
    ),
    "LoRA of a Qwen with 128 experts": ("Qwen/Qwen3-30B-A3B", "a100-80gb-1", "{method: lora, checkpointing: none}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", OTHERS)
def test_other_blocks_run_in_the_fake_world_and_the_formula_knows_them(shape: str, tmp_path: Path) -> None:
    """Three blocks: grouped products of experts, and adapters that are folded into a copy of them; attention that is not sdpa."""
    model, cluster, strategy = OTHERS[shape]
    name = tiny(tmp_path, **{**(table_config(model) or {}), "num_hidden_layers": 3})
    found = probe(planned(name, cluster, [f"strategy={strategy}", "optimization.micro_batch=2"]))
    assert abs(found["difference"]) <= 0.05, found


CELLS = {
    "full, FSDP2, some recomputed": ("a100-80gb-8", "{method: full, parallel: fsdp2, checkpointing: selective}"),
    "QLoRA on the host of two": ("rtx4090-2x24gb", "{method: qlora, parallel: fsdp2, offload: params}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_three_depths_say_exactly_what_all_layers_would(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trebuchet.training.fake_step.WHOLE_UP_TO", 8)
    cluster, strategy = CELLS[cell]
    plan = planned(tiny(tmp_path, num_hidden_layers=9), cluster, [f"strategy={strategy}"])
    few, all_layers = fake_step(plan), fake_step(plan, whole=True)
    assert (few.measured_at, all_layers.measured_at) == ((4, 5, 6), (9,))
    assert few.phases == all_layers.phases


@pytest.mark.slow
def test_layers_that_differ_are_all_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers attend differently has no depth that stands for another."""
    monkeypatch.setattr("trebuchet.training.fake_step.WHOLE_UP_TO", 3)
    window = {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    name = tiny(tmp_path, model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_hidden_layers=4, **window)
    found = fake_step(planned(name, "rtx4090-1", ["strategy=lora", "data.max_length=64"]))
    assert found.measured_at == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_parameters_on_the_host_of_one_gpu(method: str, tmp_path: Path) -> None:
    """Nothing is gathered from others; each unit still comes from the host, and its largest tensor is there twice for a moment."""
    name = tiny(tmp_path, **{**(table_config("meta-llama/Llama-3.1-8B") or {}), "num_hidden_layers": 3})
    strategy = f"strategy={{method: {method}, parallel: fsdp2, offload: params, checkpointing: full}}"
    found = probe(planned(name, "a100-80gb-1", [strategy, "optimization.micro_batch=1"]))
    assert abs(found["difference"]) <= 0.05, found


PAIRS = {
    "full, FSDP2 over 8, precomputed": ("a100-80gb-8", "{method: full, parallel: fsdp2}"),
    "LoRA, DDP of 8, adapters off": ("a100-80gb-8", "{method: lora, parallel: ddp}"),
    "LoRA, FSDP2 over 8": ("a100-80gb-8", "{method: lora, parallel: fsdp2, checkpointing: none}"),
    "QLoRA on one": ("rtx4090-1", "{method: qlora, checkpointing: full}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("cell", PAIRS)
def test_a_pair_costs_at_most_two_rows_of_sft(cell: str, objective: str, tmp_path: Path) -> None:
    """Over layouts; other objectives and one process: tests/training/objectives/test_memory.py. And the formula knows it."""
    cluster, strategy = PAIRS[cell]
    name = tiny(tmp_path, **{**(table_config("meta-llama/Llama-3.1-8B") or {}), "num_hidden_layers": 3})
    peaks = {}
    for kind, rows in (("sft", 2), (objective, 1 if objective == "dpo" else 2)):
        forced = [f"strategy={strategy}", f"objective={kind}", f"optimization.micro_batch={rows}"]
        plan = planned(name, cluster, [*forced, f"optimization.global_batch_size={8 * rows}", "data.packing=false"])
        assert plan.chosen is not None and plan.chosen.micro_batch == rows
        found = fake_step(plan)
        peaks[kind] = found.peak_bytes
        if kind != "sft":
            formula = max(expected(plan)[phase] for phase in found.phases)
            assert abs(formula / found.peak_bytes - 1) <= 0.05
    assert peaks[objective] <= 1.02 * peaks["sft"]


def test_places_that_are_not_on_a_line_are_not_followed() -> None:
    steps = [{("forward", "first", 0, 0): 100 + 10 * depth, ("begin", "first", -1, 0): 7} for depth in DEPTHS]
    assert at_depth(steps, 80) == {("forward", "first", 0, 0): 900, ("begin", "first", -1, 0): 7}
    bent = [dict(step) for step in steps]
    bent[2]["forward", "first", 0, 0] += 1
    assert at_depth(bent, 80) is None and at_depth([steps[0], None, steps[2]], 80) is None
    assert at_depth([steps[0], steps[1], {**steps[2], ("forward", "last", 0, 1): 1}], 80) is None


def test_a_middle_layer_that_stands_out_is_not_followed() -> None:
    timeline = Timeline(StorageTracker(), layers=5)
    timeline.peaks = {("forward", layer, 0): 10 + layer for layer in range(5)}
    places = timeline.places()
    assert places is not None and ("forward", "first", 1, 0) in places and ("forward", "last", 1, 0) in places
    timeline.peaks["forward", 2, 0] = 99
    assert timeline.places() is None


def test_fsdp2_in_the_fake_world_holds_a_share_of_the_states(tmp_path: Path) -> None:
    """Between steps a rank of 8 holds an eighth of weights, gradients and moments, 16 bytes a parameter in fp32."""
    plan = planned(tiny(tmp_path), "a100-80gb-8", ["strategy.method=full", "strategy.parallel=fsdp2"])
    assert plan.chosen is not None and plan.chosen.dp_shard == 8
    states = 16 * plan.model.params / 8
    assert probe(plan)["phases"]["optimizer_step"]["probe_gib"] * 2**30 == pytest.approx(states, rel=0.05, abs=1e6)


def test_a_probe_far_from_the_formula_is_said() -> None:
    phases = {"forward_backward": {"probe_gib": 10.0, "formula_gib": 9.4}}
    far = probe_lines({"phases": phases, "difference": -0.06, "layers": 80, "measured_at": [4, 5, 6], "seconds": 1.0})
    near = probe_lines({"phases": phases, "difference": -0.05, "layers": 2, "measured_at": [2], "seconds": 1.0})
    assert "measured at 4, 5 and 6 of 80 layers" in far[1] and not any("measured" in line for line in near)
    assert "-6.0 %" in far[-1] and "more than 5 %" in far[-1] and "more than 5 %" not in near[-1]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(f"model: {tiny(tmp_path)}\ndata: train.jsonl\ncluster: rtx4090-1\n")
    assert main(["plan", str(config), "--probe", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probe"]) == {
        "phases",
        "difference",
        "layers",
        "measured_at",
        "seconds",
    }
    assert main(["plan", str(config), "--probe"]) == 0
    assert "Probe: one step on fake tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy.parallel=zero3"], "cannot run DeepSpeed"),
        (["objective=reward"], "knows no score heads"),
        (["objective={name: dpo, reference: copy}"], "is a second one"),
    ],
)
def test_what_cannot_be_probed_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        probe(planned(tiny(tmp_path), "a100-80gb-8", overrides))
