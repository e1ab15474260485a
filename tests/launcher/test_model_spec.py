"""Parameter counts against transformers on the meta device, adapter counts against PEFT, and where a model is found.

Every row of the built-in table is built with one and with two blocks instead of all: a count is affine in the blocks
as long as they are alike, so two points fix it, and 405B with 126 blocks would take minutes. That blocks are alike is
checked by building two whole models.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trebuchet.launcher.errors import ModelError
from trebuchet.launcher.model_families import FAMILIES
from trebuchet.launcher.model_layout import layout
from trebuchet.launcher.model_spec import ModelSpec, is_hub_id, load_model_spec, table
from trebuchet.launcher.schema import Model

ROWS = sorted(
    {json.dumps(config, sort_keys=True): name for name, config in table().items()}.items(), key=lambda r: r[1]
)
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "phimoe": {"num_local_experts": 3, "lm_head_bias": True},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 48},
    "olmoe": {"num_experts": 3},
}
# Totals that the Hub shows for the safetensors of these models: a third source, for the dimensions themselves.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-MoE-instruct": 41_873_153_344,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}


def reference(config: dict[str, Any]) -> PreTrainedModel:
    """The model transformers builds from a config.json, without memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def spec_of(config: dict[str, Any], folder: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_spec(Model(name=str(folder)))


def counted(config: dict[str, Any]) -> int:
    found = layout(config)
    linear = sum(layer.params for layer in found.linears if layer.kind != "router")
    return found.embedding_params + found.other_params + linear


def peft_count(model: PreTrainedModel, r: int, targets: Any) -> int:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Phi's router returns two tensors: PEFT's layer around it fails when it is called
        left = ["mlp.router"] if model.config.model_type == "phimoe" else None
        config = LoraConfig(r=r, target_modules=targets, exclude_modules=left, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("row", [row for row, _ in ROWS], ids=[name for _, name in ROWS])
def test_every_row_of_the_table_counts_as_transformers_does(row: str) -> None:
    for layers in (1, 2):
        config = {**json.loads(row), "num_hidden_layers": layers}
        assert counted(config) == reference(config).num_parameters()


@pytest.mark.parametrize("name", ["SmolLM2-135M", "gemma-3-270m"])
def test_all_blocks_are_alike(name: str) -> None:
    assert load_model_spec(Model(name=name)).params == reference(dict(table()[name])).num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    assert load_model_spec(Model(name=name), offline=True).params == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(family: str) -> None:
    experts = {key: value for key, value in MORE.get(family, {}).items() if "experts" in key}
    config = {"model_type": family, "num_hidden_layers": 1, **experts}
    assert counted(config) == reference(config).num_parameters()
    whole = AutoConfig.for_model(family)
    assert layout({"model_type": family}).dims["max_position_embeddings"] == whole.max_position_embeddings
    assert layout({"model_type": family}).dims["num_layers"] == whole.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_adapters_agree_with_transformers_and_peft(family: str, tmp_path: Any) -> None:
    config = {"model_type": family, **SMALL, **MORE.get(family, {})}
    spec = spec_of(config, tmp_path)
    model = reference(config)
    matrices = {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1 and "router" not in n}
    linear = sum(p.numel() for n, p in matrices.items() if not n.endswith("mlp.gate.weight"))
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert spec.linear_params == linear
    assert spec.expert_params == sum(p.numel() for p in matrices.values() if p.dim() == 3)
    assert spec.embedding_params == sum(p.numel() for p in embeddings)
    assert spec.params == spec.linear_params + spec.embedding_params + spec.other_params == model.num_parameters()
    assert spec.lora_params(4, "all-linear") == peft_count(model, 4, "all-linear")
    names = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj"]
    assert spec.lora_params(3, tuple(names)) == peft_count(reference(config), 3, names)
    assert spec.lora_params(3, (names[0], "lm_head")) == peft_count(reference(config), 3, [names[0], "lm_head"])
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    heads=st.integers(1, 6),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([None, 2, 6, 16]),
    width=st.integers(1, 5),
    intermediate=st.integers(1, 70),
    vocab=st.integers(3, 200),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_dimensions(
    family: str,
    heads: int,
    group: int,
    head_dim: int | None,
    width: int,
    intermediate: int,
    vocab: int,
    flags: tuple[bool, bool, bool],
) -> None:
    config = {
        **{"model_type": family, **SMALL, **MORE.get(family, {})},
        "hidden_size": heads * group * width * 4,
        "num_attention_heads": heads * group,
        "num_key_value_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": flags[0],
        "attention_bias": flags[1],
        "mlp_bias": flags[2],
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    model = reference(config)
    assert counted(config) == model.num_parameters()
    expected = peft_count(model, 2, "all-linear")
    assert sum(layer.lora_params(2) for layer in layout(config).linears) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "'mamba2' is not one whose.*supported: gemma.*smollm3"),
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, not 0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a positive whole number, not '4'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\); give the 16-bit model"),
        ({"vision_config": {"depth": 2}}, "takes more than text"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec_of({"model_type": "llama", **SMALL, **change}, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


KEYS = [*SMALL, *MORE["qwen3_moe"], "num_local_experts", "head_dim", "mlp_only_layers", "decoder_sparse_step", "dtype"]
values = (
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.text(max_size=3) | st.lists(st.integers(0, 3))
)


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_any_config_is_counted_or_refused_in_a_sentence(family: str, change: dict[str, Any]) -> None:
    try:
        found = layout({"model_type": family, **SMALL, **MORE.get(family, {}), **change})
    except ModelError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
    else:
        assert found.embedding_params > 0 and all(layer.params >= 0 for layer in found.linears)


def test_unknown_targets_name_the_nearest(tmp_path: Any) -> None:
    spec = spec_of({"model_type": "llama", **SMALL}, tmp_path)
    with pytest.raises(ModelError, match="no linear layer 'q_prj'; did you mean 'q_proj'"):
        spec.lora_params(8, ("q_prj",))
    assert spec.lora_params(8, ("self_attn.q_proj",)) == spec.lora_params(8, ("q_proj",))
    for name in ("embed_tokens", "layers.0.self_attn.q_proj", "proj"):
        with pytest.raises(ModelError, match=f"no linear layer '{name}'"):
            spec.lora_params(8, ("q_proj", name))


def test_nothing_anywhere_names_the_nearest_row_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"offline; did you mean 'Qwen/Qwen2.5-7B-Instruct'.*hf download") as caught:
        load_model_spec(Model(name="Qwen/Qwen2.5-7B-Instrct"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"there is no folder \./nowhere/x"):
        load_model_spec(Model(name="./nowhere/x"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load_model_spec(Model(name=str(tmp_path / "model.gguf")))


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("gpt2", True),
        ("a/b-1.0_x", True),
        ("a/b/c", False),
        ("../x", False),
        ("~/x", False),
        ("a b/c", False),
        ("/", False),
    ],
)
def test_hub_ids(name: str, valid: bool) -> None:
    assert is_hub_id(name) is valid


def test_table_answers_in_any_case_and_keeps_the_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = load_model_spec(Model(name="qwen/qwen2.5-7b", revision="v1"), offline=True)
    assert (spec.source, spec.revision, spec.dtype, spec.path) == ("table", "v1", "bf16", None)
    assert (
        spec.max_position_embeddings == 131072
    )  # the base model's; its row's own is the instruction-tuned one's 32768


def test_a_spec_costs_no_heavy_import() -> None:
    code = (
        "import sys; from trebuchet.launcher.model_spec import load_model_spec; "
        "from trebuchet.launcher.schema import Model; load_model_spec(Model(name='Llama-3.1-8B')).lora_params(16); "
        "print({'torch', 'transformers', 'huggingface_hub', 'safetensors', 'ray', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
