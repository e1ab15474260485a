"""axolotl's keys that are read together: adapter, objective, intervals, layout. Data sets: `convert_axolotl_data.py`. Single keys:
`convert_keys.json`."""

from __future__ import annotations

from . import convert_common as common
from .convert import Keys
from .convert_axolotl_data import read_data

_RL = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}


def read(keys: Keys, gpus: int) -> None:
    if keys.get("base_model"):
        keys.take("base_model", "model.name")
    objective = _objective(keys)
    read_data(keys, objective)
    adapter = keys.get("adapter") or None
    if adapter in (None, "lora", "qlora"):
        common.method(keys, adapter, "load_in_4bit", "load_in_8bit")
        if "adapter" in keys.tree:
            keys.carried["adapter"] = "strategy.method"
    else:
        keys.note("adapter", "strategy.method: lora")
        common.method(keys, "lora", "load_in_4bit", "load_in_8bit")
    if adapter:
        _targets(keys)
    else:
        for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"):
            keys.note(key, "strategy.method is full: there is no adapter for it")
    common.batch(keys, "micro_batch_size", "gradient_accumulation_steps", gpus)
    common.warmup(keys, "warmup_ratio", "warmup_steps")
    common.precision(keys)
    epochs = common.positive(keys.get("num_epochs"), 1.0)
    for often, steps, strategy, to in (
        ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation.every"),
        ("saves_per_epoch", "save_steps", "save_strategy", "checkpointing.every"),
    ):
        common.interval(keys, strategy, steps, to, epochs)
        if times := common.positive(keys.get(often), 0):
            keys.take(often, to, round(min(1 / (times * epochs), 0.999999), 6))
        elif keys.get(often) is not None:
            keys.note(often, f"{to} has a smallest number, not none: 1 in the whole run is {to}: 0.99")
    _attention(keys)
    common.layout(keys)
    _tracking(keys)
    if keys.get("chat_template") is not None:
        _template(keys)
    if keys.get("lora_model_dir") is None and keys.get("sample_packing") is None:
        keys.set("data.packing", False)  # axolotl packs only where it is asked to


def _objective(keys: Keys) -> str:
    name = "sft"
    if keys.get("rl"):
        if (rl := str(keys.get("rl"))) not in _RL:
            keys.note(
                "rl", "objective: dpo, orpo, simpo, cpo, kto or reward; generation during training is not part of any"
            )
            return name
        name = _RL[rl]
        keys.take("rl", "objective.name", name)
        if rl == "ipo":
            keys.set("objective.loss", "ipo")
        for key in ("rl_beta", "dpo_beta", "orpo_alpha"):
            if keys.get(key) is not None:
                keys.take(key, "objective.beta")
    elif keys.get("reward_model"):
        name = "reward"
        keys.take("reward_model", "objective.name", name)
    elif keys.get("process_reward_model"):
        keys.note("process_reward_model", "objective: reward scores whole answers, not steps")
    return name


def _targets(keys: Keys) -> None:
    if keys.get("lora_target_linear"):
        keys.take("lora_target_linear", "strategy.lora.targets", "all-linear")
        if keys.get("lora_target_modules"):
            keys.note(
                "lora_target_modules", "lora_target_linear is set too: strategy.lora.targets: all-linear holds them"
            )
        return
    if "lora_target_linear" in keys.tree:
        keys.carried["lora_target_linear"] = "strategy.lora.targets"
    if keys.get("lora_target_modules"):
        common.targets(keys, "lora_target_modules")


def _attention(keys: Keys) -> None:
    common.attention(keys, "attn_implementation")
    for key, name in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if keys.get(key) is True:
            keys.take(key, "model.attention", name)
        elif key in keys.tree:
            keys.carried[key] = "model.attention"
    for key in ("xformers_attention", "flex_attention", "sage_attention", "s2_attention"):
        if keys.get(key):
            keys.note(key, "model.attention: auto takes what the device and the packing allow")


def _tracking(keys: Keys) -> None:
    for key, name in (
        ("wandb_project", "wandb"),
        ("use_wandb", "wandb"),
        ("mlflow_experiment_name", "mlflow"),
        ("use_mlflow", "mlflow"),
        ("comet_project_name", "comet_ml"),
        ("use_comet", "comet_ml"),
        ("use_tensorboard", "tensorboard"),
        ("trackio_project_name", "trackio"),
        ("use_trackio", "trackio"),
    ):
        if keys.get(key):
            common.trackers(keys, [name], key)
            if not key.startswith("use_"):
                keys.note(key, f"tracking: [{name}]; the project's name is {_VARIABLE[name]} in the environment")
        elif keys.get(key) is not None:
            keys.carried[key] = "tracking"
    keys.out.setdefault("tracking", [])


_VARIABLE = {
    "wandb": "WANDB_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "trackio": "TRACKIO_PROJECT",
}


def _template(keys: Keys) -> None:
    name = str(keys.get("chat_template"))
    if name == "tokenizer_default":
        keys.carried["chat_template"] = "data.chat_template"
    elif name in ("chatml", "alpaca"):
        keys.take("chat_template", "data.chat_template", name)
    elif name == "jinja":
        keys.note("chat_template", "data.chat_template: save chat_template_jinja as a file and name that")
        keys.note("chat_template_jinja", "data.chat_template: save it as a file and name that")
    else:
        keys.note(
            "chat_template",
            "data.chat_template: by default the tokenizer's own, which an instruct model has; or a Jinja file",
        )
