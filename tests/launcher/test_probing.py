"""`plan --probe`: the formula against one step of the real model code on fake tensors, over layouts, methods and families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.cli import main
from trebuchet.launcher.cli_plan import probe_lines
from trebuchet.launcher.errors import UserError
from trebuchet.launcher.model_spec import table_config
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.probing import probe

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


# All 80 layers take minutes. Each adds the same boundary and shards; with few the gathered head weighs most, which hides nothing.
LAYERS_OF_THE_70B = 8


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["strategy.checkpointing=full", "optimization.micro_batch=1"], []])
def test_qlora_of_a_70b_with_parameters_on_the_host_of_two_ranks(tmp_path: Path, settings: list[str]) -> None:
    sizes = {**table_config("meta-llama/Llama-3.1-70B"), "num_hidden_layers": LAYERS_OF_THE_70B}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "architectures": ["LlamaForCausalLM"]}))
    forced = ["strategy.method=qlora", "strategy.parallel=fsdp2", "strategy.offload=params", *settings]
    plan = planned(str(tmp_path), "rtx4090-2x24gb", forced)
    assert plan.chosen is not None and plan.chosen.ranks == 2
    found = probe(plan)
    assert abs(found["difference"]) <= 0.05, found


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_within_five_percent_of_the_probe(shape: str) -> None:
    found = probe(planned(*SHAPES[shape]))
    assert abs(found["difference"]) <= 0.05, found
    assert not any("more than 5 %" in line for line in probe_lines(found))


def tiny(tmp_path: Path) -> str:
    sizes = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return str(tmp_path)


def test_fsdp2_in_the_fake_world_holds_a_share_of_the_states(tmp_path: Path) -> None:
    """Between steps a rank of 8 holds an eighth of weights, gradients and moments, 16 bytes a parameter in fp32."""
    plan = planned(tiny(tmp_path), "a100-80gb-8", ["strategy.method=full", "strategy.parallel=fsdp2"])
    assert plan.chosen is not None and plan.chosen.dp_shard == 8
    states = 16 * plan.model.params / 8
    assert probe(plan)["phases"]["optimizer_step"]["probe_gib"] * 2**30 == pytest.approx(states, rel=0.05, abs=1e6)


def test_a_probe_far_from_the_formula_is_said() -> None:
    phases = {"forward_backward": {"probe_gib": 10.0, "formula_gib": 9.4}}
    far = probe_lines({"phases": phases, "difference": -0.06, "seconds": 1.0})
    near = probe_lines({"phases": phases, "difference": -0.05, "seconds": 1.0})
    assert "-6.0 %" in far[-1] and "more than 5 %" in far[-1] and "more than 5 %" not in near[-1]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(f"model: {tiny(tmp_path)}\ndata: train.jsonl\ncluster: rtx4090-1\n")
    assert main(["plan", str(config), "--probe", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probe"]) == {"phases", "difference", "seconds"}
    assert main(["plan", str(config), "--probe"]) == 0
    assert "Probe: one step on fake tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["strategy.parallel=zero3"], "cannot run DeepSpeed"), (["objective=dpo"], "runs a step of language modelling")],
)
def test_what_cannot_be_probed_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        probe(planned(tiny(tmp_path), "a100-80gb-8", overrides))
