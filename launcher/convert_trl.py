"""TRL's own keys that are read together: which trainer the arguments are of, data, adapter."""

from __future__ import annotations

from typing import Any

from . import convert_common as common
from .convert import Keys


def read_trl(keys: Keys) -> None:
    loss = keys.get("loss_type")
    losses = loss if isinstance(loss, list) and loss else [loss]
    if any(keys.get(key) is not None for key in ("desirable_weight", "undesirable_weight")) or loss == "kto":
        name = "kto"
    elif keys.get("center_rewards_coefficient") is not None:
        name = "reward"
    elif keys.get("cpo_alpha") is not None or keys.get("simpo_gamma") is not None or loss == "simpo":
        name = "simpo" if loss == "simpo" else "cpo"
    elif keys.get("beta") is not None or (loss is not None and loss not in ("nll", "dft", "chunked_nll")):
        name = "dpo"
    else:
        name = "sft"
    keys.set("objective.name", name)
    if name == "simpo" and keys.get("cpo_alpha") == 0:
        keys.carried["cpo_alpha"] = "objective.name"  # ours has no loss on the chosen answer in any case
    if name in ("dpo", "cpo") and losses[0] in ("sigmoid", "hinge", "ipo") and len(losses) == 1:
        keys.take("loss_type", "objective.loss", losses[0])
    elif loss in ("simpo", "kto", "nll"):
        keys.carried["loss_type"] = "objective.name"
    elif loss is not None:
        keys.note("loss_type", "objective: sft; dpo and cpo with loss sigmoid, hinge or ipo; orpo, simpo, kto, reward")
    if keys.get("beta") is not None:
        keys.take("beta", "objective.beta")
    keys.lines["objective"] = (
        f"objective: {name}: taken from the keys, for TRL names it on its command line; --objective NAME says another"
    )
    _trl_data(keys, name)
    adapter = "lora" if keys.get("use_peft") else None
    common.method(keys, adapter, "load_in_4bit", "load_in_8bit")
    if "use_peft" in keys.tree:
        keys.carried["use_peft"] = "strategy.method"
    if adapter:
        common.targets(keys, "lora_target_modules")
    else:
        for key in ("lora_target_modules", "lora_r", "lora_alpha", "lora_dropout"):
            keys.note(key, "strategy.method is full: there is no adapter for it (use_peft is off)")
    if keys.get("packing") is None:
        keys.set("data.packing", False)  # TRL packs only where it is asked to
    for key in ("torch_dtype", "dtype"):
        words = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto"}
        if str(keys.get(key)) in words:
            keys.take(key, "model.dtype", words[str(keys.get(key))])
    common.attention(keys, "attn_implementation")


def _trl_data(keys: Keys, objective: str) -> None:
    split, subset = (
        str(value) if value else None for value in map(keys.tree.get, ("dataset_train_split", "dataset_config"))
    )
    extra: dict[str, Any] = ({"split": split} if split else {}) | ({"subset": subset} if subset else {})
    for key, value in (("dataset_train_split", split), ("dataset_config", subset)):
        if value:
            keys.carried[key] = "data.train"
    column = keys.tree.get("dataset_text_field")
    if isinstance(column, str) and column and column != "text":
        extra["columns"] = {"text": column}
        keys.note("dataset_text_field", "columns of the source, where its rows are plain text")
    elif column == "text":
        keys.carried["dataset_text_field"] = "data.train"
    test = str(keys.tree.get("dataset_test_split") or "")
    if keys.get("dataset_name"):
        keys.take("dataset_name", "data.train", [{"path": str(keys.tree["dataset_name"])} | extra])
        if test and str(keys.get("eval_strategy")).lower() not in ("no", "none", "false"):
            keys.take(
                "dataset_test_split", "data.eval", [{"path": str(keys.tree["dataset_name"])} | extra | {"split": test}]
            )
    elif isinstance(keys.get("datasets"), list) and all(isinstance(entry, dict) for entry in keys.get("datasets")):
        sources = []
        for entry in keys.get("datasets"):
            source: dict[str, Any] = {"path": entry.get("path")}
            source |= {
                ours: entry[theirs] for theirs, ours in (("name", "subset"), ("split", "split")) if entry.get(theirs)
            }
            if entry.get("data_files"):
                files = entry["data_files"]
                source["path"] = files if isinstance(files, str) else files[0]
                keys.note("datasets", "one file a source; name others as sources of their own")
            sources.append(source)
        keys.take("datasets", "data.train", sources)
    if "eval" not in keys.out.get("data", {}):
        keys.set("data.eval", 0.0)  # TRL evaluates only on a split that is named
    only = keys.get("assistant_only_loss")
    if isinstance(only, bool) and objective == "sft":
        keys.take("assistant_only_loss", "data.train_on", "assistant")
        if not only:
            keys.note(
                "assistant_only_loss",
                "data.train_on: assistant; `all` trains every token, as TRL does on rows of messages",
            )
