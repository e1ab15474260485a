"""Recipes of axolotl, LlamaFactory and TRL: each converts, is valid, plans, and accounts for every one of its keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher import api
from trebuchet.launcher.cli import main
from trebuchet.launcher.config import load_config
from trebuchet.launcher.convert import FORMATS, Converted, Keys, convert, tables
from trebuchet.launcher.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
ALL = {
    f"{name}-{number}": (name, recipe)
    for name in FORMATS
    for number, recipe in enumerate(yaml.safe_load_all((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")), start=1)
}
CLUSTERS = ("rtx4090-1", "a100-80gb-8", "h100-64")


def converted(recipe: dict[str, Any], folder: Path, **how: Any) -> Converted:
    (folder / "data").mkdir(exist_ok=True)
    shutil.copy(RECIPES / "dataset_info.json", folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return convert(path, **how)


def test_there_are_enough_recipes() -> None:
    counts = {name: sum(origin == name for origin, _ in ALL.values()) for name in FORMATS}
    assert all(count >= 20 for count in counts.values()), counts


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_recognised_converts_and_plans(name: str, tmp_path: Path) -> None:
    origin, recipe = ALL[name]
    made = converted(recipe, tmp_path)
    assert made.format == origin
    ours = tmp_path / "ours.yaml"
    ours.write_text(made.text(), encoding="utf-8")
    config = load_config(ours)
    assert config.model.name == recipe.get("base_model", recipe.get("model_name_or_path"))
    assert any(api.plan(config, cluster=cluster).feasible for cluster in CLUSTERS)


@pytest.mark.parametrize("name", ALL)
def test_every_key_of_a_recipe_is_carried_or_has_a_line(name: str, tmp_path: Path) -> None:
    _, recipe = ALL[name]
    made = converted(recipe, tmp_path)
    lined = {line.split(": ")[0] for line in made.lines}
    for key, value in recipe.items():
        if value is None:
            assert key in made.empty or key in made.carried or key in lined, key
        else:
            assert key in made.carried or key in lined, key
    for line in made.lines:
        assert "\n" not in line and len(line.split(": ", 1)[1]) > 10
    for to in made.carried.values():
        section = to.split(".")[0]
        assert section in made.tree or section in (
            "tracking",
            "data",
            "strategy",
            "optimization",
            "model",
            "evaluation",
            "checkpointing",
        )


EXPECTED: dict[str, dict[str, Any]] = {
    "axolotl-1": {
        "strategy.method": "full", "optimization.global_batch_size": 8, "optimization.learning_rate": 2e-5,
        "data.packing": True, "data.max_length": 2048, "evaluation.every": 0.166667, "checkpointing.every": 0.333333,
        "optimization.warmup": 0.1, "strategy.checkpointing": "full", "model.attention": "flash_attention_2", "tracking": [],
    },
    "axolotl-3": {"strategy.method": "qlora", "optimization.warmup": 10, "data.packing": True, "data.eval": 0.0},
    "axolotl-4": {
        "data.train": [{"path": "my.jsonl", "columns": {"instruction": "question", "output": "answer"}, "format": "alpaca"}],
        "strategy.lora.targets": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"],
        "model.dtype": "bf16", "data.packing": False, "optimization.optimizer": "adamw-8bit",
    },
    "axolotl-5": {"strategy.parallel": "zero3", "strategy.kernels": "on"},
    "axolotl-6": {
        "objective.name": "dpo", "objective.beta": 0.2, "objective.label_smoothing": 0.1,
        "data.train": [
            {"path": "Intel/orca_dpo_pairs", "split": "train", "format": "preference", "columns": {"prompt": "question"}},
            {"path": "argilla/ultrafeedback-binarized-preferences", "split": "train", "format": "preference",
             "columns": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}},
        ],
    },
    "axolotl-7": {"objective.loss": "ipo", "optimization.max_steps": 200, "optimization.schedule": "constant"},
    "axolotl-8": {"objective.name": "kto", "objective.desirable_weight": 0.2, "strategy.method": "qlora", "tracking": ["wandb"]},
    "axolotl-11": {"objective.name": "reward", "objective.center": 0.01, "model.attention": "eager"},
    "axolotl-12": {"objective.name": "pretrain", "data.train": [{"path": "corpus.jsonl", "format": "text", "columns": {"text": "body"}}]},
    "axolotl-14": {"strategy.parallel": "fsdp2", "strategy.offload": "params"},
    "axolotl-16": {"data.train_on": ["assistant", "tool"], "data.eval": [{"path": "held.jsonl", "split": "train"}]},
    "axolotl-20": {"strategy.method": "qlora", "strategy.quant.type": "int8", "evaluation.every": 0.5},
    "llamafactory-1": {
        "strategy.method": "lora", "strategy.lora.r": 8, "strategy.lora.alpha": 16, "strategy.lora.targets": "all-linear",
        "data.train": [{"path": "identity.json", "format": "alpaca"}, {"path": "alpaca_en_demo.json", "format": "alpaca"}],
        "optimization.global_batch_size": 8, "checkpointing.every": 500, "tracking": [], "data.packing": False,
    },
    "llamafactory-2": {"strategy.method": "full", "strategy.parallel": "zero3", "data.eval": 0.1, "evaluation.every": 500},
    "llamafactory-3": {
        "strategy.method": "qlora", "strategy.quant.double": False, "strategy.lora.targets": ["q_proj", "v_proj"],
        "model.dtype": "fp16",
    },
    "llamafactory-4": {"strategy.quant.type": "int8", "data.packing": True},
    "llamafactory-5": {
        "objective.name": "dpo",
        "data.train": [{"path": "dpo_en_demo.json", "format": "preference", "columns": {"prompt": "conversations"}}],
    },
    "llamafactory-6": {
        "objective.name": "orpo", "objective.beta": 0.2,
        "data.train": [{"path": "Intel/orca_dpo_pairs", "format": "preference", "columns": {"prompt": "question"}}],
    },
    "llamafactory-7": {"objective.name": "simpo", "objective.gamma": 0.5},
    "llamafactory-8": {"objective.loss": "hinge", "objective.sft_weight": 0.2},
    "llamafactory-9": {"objective.name": "kto", "data.train": [{"path": "kto_en_demo.json", "format": "kto"}]},
    "llamafactory-11": {"objective.name": "pretrain", "data.packing": True},
    "llamafactory-12": {"strategy.parallel": "zero3", "strategy.offload": "params"},
    "llamafactory-17": {"optimization.max_steps": 500, "optimization.warmup": 50, "checkpointing.keep": 3},
    "trl-1": {
        "objective.name": "sft", "data.packing": True, "strategy.method": "full",
        "data.eval": [{"path": "trl-lib/Capybara", "split": "test"}],
    },
    "trl-2": {"strategy.method": "qlora", "data.max_length": 4096, "model.dtype": "bf16", "strategy.checkpointing": "full"},
    "trl-3": {"objective.name": "dpo", "objective.reference": "precomputed", "optimization.max_steps": 1000},
    "trl-4": {"objective.name": "kto", "objective.undesirable_weight": 1.33, "strategy.quant.type": "int8", "optimization.warmup": 0.1},
    "trl-8": {"objective.name": "simpo", "objective.gamma": 1.4, "objective.beta": 2.5},
    "trl-9": {"objective.name": "cpo", "objective.loss": "hinge", "checkpointing.keep": 2, "model.attention": "eager"},
    "trl-10": {"objective.name": "dpo", "objective.loss": "ipo", "objective.beta": 0.05, "strategy.method": "qlora"},
    "trl-13": {"data.packing": True, "optimization.max_steps": 500, "tracking": [], "optimization.seed": 42},
    "trl-14": {"data.train": [{"path": "wikitext", "subset": "wikitext-103-raw-v1"}], "optimization.weight_decay": 0.1},
    "trl-18": {
        "data.train": [{"path": "one.jsonl"}, {"path": "org/b", "subset": "math", "split": "train[:10%]"}],
        "strategy.lora.targets": ["qkv_proj", "o_proj"],
    },
    "trl-19": {"objective.name": "reward", "strategy.method": "qlora"},
    "trl-5": {"objective.name": "reward", "objective.center": 0.01, "evaluation.every": 0.999999},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_recipe_means(name: str, tmp_path: Path) -> None:
    made = converted(ALL[name][1], tmp_path)
    for path, value in EXPECTED[name].items():
        found: Any = made.tree
        for part in path.split("."):
            found = found[part]
        if path == "data.train":
            found = [source | {"path": source["path"].removeprefix(f"{tmp_path}/data/")} for source in found]
        assert found == value, path


@pytest.mark.parametrize(
    "name, line",
    [
        ("axolotl-3", "optimizer: paged_adamw_32bit: optimization.optimizer has adamw, adamw-8bit, paged-adamw-8bit"),
        ("axolotl-3", "chat_template: llama3: data.chat_template: by default the tokenizer's own"),
        ("axolotl-15", "peft_use_dora: true: strategy.lora is plain LoRA"),
        ("axolotl-17", "strategy.parallel: auto; ZeRO 1 and 2 have no counterpart"),
        ("axolotl-18", "lr_scheduler: rex: optimization.schedule has cosine, linear, constant"),
        ("axolotl-18", "datasets: of alpaca.json: shards: weight: 0.5 takes a random half"),
        ("axolotl-19", "model_config: {\"output_router_logits\": true}: not known here"),
        ("axolotl-20", "lora_alpha: 32.5: strategy.lora.alpha must be a whole number"),
        ("axolotl-20", "val_set_size: 200: data.eval: a share below 1, or rows of their own"),
        ("axolotl-21", "rl: grpo: objective: dpo, orpo, simpo, cpo, kto or reward"),
        ("axolotl-2", "micro_batch_size: 2: optimization.global_batch_size: 4, on 1 device (--gpus N if there were more)"),
        ("llamafactory-1", "max_samples: 1000: `weight` of a source of data.train"),
        ("llamafactory-14", "badam_verbose: 2: not known here"),
        ("llamafactory-15", "finetuning_type: freeze: strategy.method: lora, or full"),
        ("llamafactory-18", "not clearml"),
        ("llamafactory-20", "stage: ppo: objective: dpo; generation during training is not part of any"),
        ("llamafactory-21", "dataset_info.json with not_in_the_list was not found; the paths are a guess"),
        ("llamafactory-21", "quantization_bit: 2: strategy.method: qlora"),
        ("trl-1", "objective: sft: taken from the keys, for TRL names it on its command line"),
        ("trl-6", "optim: adafactor: optimization.optimizer has adamw"),
        ("trl-6", "loss_type: dft: objective: sft"),
        ("trl-7", "objective: dpo: taken from the keys, for TRL names it on its command line; --objective NAME says another"),
        ("trl-11", "loss_type: [\"sigmoid\", \"bco_pair\", \"sft\"]: objective: sft; dpo and cpo with loss"),
        ("trl-12", "chat_template_path: HuggingFaceTB/SmolLM3-3B: data.chat_template: a Jinja file"),
        ("trl-16", "loss_type: apo_zero_unpaired: objective: sft; dpo and cpo with loss"),
        ("trl-17", "use_vllm: true: generation during training is not part of any objective"),
        ("trl-20", "loss_type: robust: objective: sft; dpo and cpo with loss"),
        ("trl-21", "teacher_model_name_or_path: HuggingFaceTB/SmolLM2-1.7B-Instruct: objective: sft on the teacher's answers"),
    ],
)  # fmt: skip
def test_what_could_not_be_carried_is_said_with_the_nearest(name: str, line: str, tmp_path: Path) -> None:
    made = converted(ALL[name][1], tmp_path)
    assert any(line in said for said in made.lines), "\n".join(made.lines)


def test_the_global_batch_counts_the_devices(tmp_path: Path) -> None:
    assert converted(ALL["axolotl-1"][1], tmp_path, gpus=4).tree["optimization"]["global_batch_size"] == 32


def test_an_objective_on_the_command_line(tmp_path: Path) -> None:
    made = converted({"model_name_or_path": "a/b", "dataset_name": "c/d"}, tmp_path, objective="orpo", format="trl")
    assert made.tree["objective"]["name"] == "orpo"


@pytest.mark.parametrize(
    "tree, says",
    [
        ({"model": "a", "data": "b"}, "is ours already"),
        ({"hello": 1}, "cannot tell whose YAML this is; say it with --from"),
        ({"base_model": "a", "sequence_len": 10}, r"no data is named in it, which every run needs \(datasets\)"),
        ({"stage": "sft", "dataset": "x"}, r"no model is named in it"),
        ([1], "must hold keys and values"),
    ],
)
def test_what_is_no_recipe(tree: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        converted(tree, tmp_path)


values = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), max_size=2)
)


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(FORMATS))
def test_no_value_of_a_known_key_is_lost_or_breaks_it(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any values under any keys: either a valid configuration with every key accounted for, or a sentence."""
    more = ("adapter", "rl", "stage", "deepspeed", "fsdp_config", "report_to", "warmup_steps")
    known = sorted({*tables()[name], *tables()["hf"], *more})
    first = {"axolotl": {"base_model": "a/b", "datasets": [{"path": "c"}]}, "llamafactory": {"model_name_or_path": "a/b", "dataset": "c"},
             "trl": {"model_name_or_path": "a/b", "dataset_name": "c"}}[name]  # fmt: skip
    recipe = data.draw(st.dictionaries(st.sampled_from(known), values, max_size=8)) | first
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    made = convert(path, format=name)
    lined = {line.split(": ")[0] for line in made.lines}
    assert all(key in made.carried or key in lined or key in made.empty for key in recipe)
    ours = path.with_name("ours.yaml")
    ours.write_text(made.text(), encoding="utf-8")
    load_config(ours)


def test_the_command_writes_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump(ALL["axolotl-15"][1]), encoding="utf-8")
    assert main(["convert", str(path), "--output", str(tmp_path / "train.yaml")]) == 0
    said = capsys.readouterr().out
    assert "#   peft_use_dora: true: strategy.lora is plain LoRA" in said and "keys of axolotl carried" in said
    assert load_config(tmp_path / "train.yaml").strategy.lora.r == 64
    assert main(["convert", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "axolotl"
    assert main(["convert", str(path)]) == 0
    printed = capsys.readouterr()
    assert "peft_use_dora" in printed.err
    assert yaml.safe_load(printed.out)["model"]["name"] == "microsoft/Phi-3-mini-4k-instruct"


def test_every_place_in_the_tables_is_a_key_of_ours() -> None:
    from trebuchet.launcher.config import build_config

    whole = build_config({"model": "a", "data": "b"}).model_dump()
    for name in (*FORMATS, "hf"):
        for key, entry in tables()[name].items():
            to = entry["to"] if isinstance(entry, dict) else entry[1:] if entry.startswith("=") else None
            found: Any = whole
            for part in (to or "").split(".") if to else []:
                assert part in found, f"{name}.{key} -> {to}"
                found = found[part]


def test_numbers_that_yaml_reads_as_text() -> None:
    keys = Keys({"a": "2e-4", "b": "east", "c": "1e", "d": "meta/llama-3e"})
    assert [keys.get(key) for key in "abcd"] == [2e-4, "east", "1e", "meta/llama-3e"]
