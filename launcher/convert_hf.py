"""LlamaFactory's and TRL's keys that are read together: both are built on transformers' TrainingArguments. Single keys are in
`convert_keys.json`; TRL's data and objective: `convert_trl.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import convert_common as common
from .convert import Keys
from .convert_trl import read_trl

_STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_PREF_LOSS = {
    "sigmoid": ("dpo", None),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "orpo": ("orpo", None),
    "simpo": ("simpo", None),
}


def read(keys: Keys, format: str, gpus: int, folder: Path) -> None:
    _llamafactory(keys, folder) if format == "llamafactory" else read_trl(keys)
    common.batch(keys, "per_device_train_batch_size", "gradient_accumulation_steps", gpus)
    if isinstance(keys.get("max_steps"), int):
        if keys.get("max_steps") > 0:
            keys.take("max_steps", "optimization.max_steps")
        else:
            keys.carried["max_steps"] = "optimization.max_steps"
    common.warmup(keys, "warmup_ratio", "warmup_steps")
    common.precision(keys)
    epochs = common.positive(keys.get("num_train_epochs"), 3.0)
    common.interval(keys, "evaluation_strategy" if "evaluation_strategy" in keys.tree else "eval_strategy", "eval_steps",
                    "evaluation.every", epochs)  # fmt: skip
    common.interval(keys, "save_strategy", "save_steps", "checkpointing.every", epochs)
    common.layout(keys)
    if (names := keys.get("report_to")) is not None:
        names = names if isinstance(names, list) else [names] if names else []
        common.trackers(keys, list(common.TRACKERS) if names == ["all"] else names, "report_to")
        if names == ["all"]:
            keys.set("tracking", ["tensorboard"])
            keys.note("report_to", "tracking: [tensorboard]; name the others that are installed")


def _llamafactory(keys: Keys, folder: Path) -> None:
    stage = str(keys.get("stage") or "sft")
    name, loss = _STAGES.get(stage), None
    if name is None:
        keys.note("stage", "objective: dpo; generation during training is not part of any")
        name = "sft"
    elif "stage" in keys.tree:
        keys.carried["stage"] = "objective.name"
    if stage == "dpo" and keys.get("pref_loss"):
        if str(keys.get("pref_loss")) in _PREF_LOSS:
            name, loss = _PREF_LOSS[str(keys.get("pref_loss"))]
            keys.carried["pref_loss"] = "objective"
        else:
            keys.note("pref_loss", "objective: dpo, its loss sigmoid, hinge or ipo; orpo; simpo; kto")
    keys.set("objective.name", name)
    if loss:
        keys.set("objective.loss", loss)
    if keys.get("pref_beta") is not None:
        if stage in ("dpo", "kto"):
            keys.take("pref_beta", "objective.beta")
        else:
            keys.note("pref_beta", f"objective.beta; {name} has none")
    _method(keys)
    _datasets(keys, name, folder)
    packing, neat = keys.get("packing"), keys.get("neat_packing")
    on = bool(packing) or bool(neat) or (packing is None and stage == "pt")
    keys.set("data.packing", on)
    for key in ("packing", "neat_packing"):
        if key in keys.tree:
            keys.carried[key] = "data.packing"
    if packing and not neat:
        keys.note("packing", "data.packing: true, in which packed samples never see each other (their neat_packing)")
    if isinstance(keys.get("train_on_prompt"), bool) and name == "sft":
        keys.take("train_on_prompt", "data.train_on", "all" if keys.get("train_on_prompt") else "assistant")
    elif "train_on_prompt" in keys.tree:
        keys.note("train_on_prompt", "data.train_on is for objective: sft")
    common.attention(keys, "flash_attn")
    for key in ("pure_bf16",):
        if keys.get(key):
            keys.take(key, "model.dtype", "bf16")


def _method(keys: Keys) -> None:
    kind = str(keys.get("finetuning_type") or "lora")
    if kind not in ("lora", "full"):
        keys.note("finetuning_type", "strategy.method: lora, or full")
        kind = "lora"
    elif "finetuning_type" in keys.tree:
        keys.carried["finetuning_type"] = "strategy.method"
    bits = keys.get("quantization_bit")
    wanted = {4: "nf4", 8: "int8"}.get(bits) if isinstance(bits, int) else None
    other = keys.get("quantization_method") or "bnb"
    if bits is not None and (wanted is None or kind == "full" or other not in ("bnb", "bitsandbytes")):
        keys.note("quantization_bit", "strategy.method: qlora, with strategy.quant.type nf4 (4 bits) or int8")
        wanted = "nf4" if kind == "lora" else None
    if "quantization_method" in keys.tree:
        keys.carried["quantization_method"] = "strategy.quant.type"
        if other not in ("bnb", "bitsandbytes"):
            keys.note("quantization_method", "strategy.quant.type: nf4 or int8, by bitsandbytes")
    keys.set("strategy.method", "qlora" if wanted else kind)
    if wanted == "int8":
        keys.set("strategy.quant.type", "int8")
    if wanted and "quantization_bit" not in keys.lines:
        keys.carried["quantization_bit"] = "strategy.quant.type"
    if kind == "lora":
        common.targets(keys, "lora_target")
        if keys.get("lora_alpha") is None and common.positive(keys.get("lora_rank"), 0):
            keys.set("strategy.lora.alpha", int(keys.get("lora_rank") * 2))  # LlamaFactory's default
    else:
        for key in ("lora_target", "lora_rank", "lora_alpha", "lora_dropout"):
            keys.note(key, "strategy.method is full: there is no adapter for it")


def _datasets(keys: Keys, objective: str, folder: Path) -> None:
    """Names of `dataset` by dataset_info.json, looked for beside the file and where LlamaFactory keeps it."""
    place = str(keys.get("dataset_dir") or "data")
    places = [folder / place, Path(place), folder, folder.parent / place]
    info: dict[str, Any] = {}
    for candidate in places:
        if (file := candidate / "dataset_info.json").is_file():
            info = json.loads(file.read_text(encoding="utf-8"))
            place = str(candidate)
            break
    for key, to in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if keys.get(key):
            names = common.names_of(keys.tree[key])
            if not names:
                keys.note(key, f"{to}: names of dataset_info.json")
                continue
            sources = [_source(str(name), info, place, objective) for name in names]
            _weights(keys, sources, key)
            keys.take(key, to, sources)
            if missing := [name for name in names if name not in info]:
                keys.note(key, f"dataset_info.json with {', '.join(missing)} was not found; the paths are a guess")
    if "dataset_dir" in keys.tree and info:
        keys.carried["dataset_dir"] = "data.train"
    share = keys.get("val_size")
    if "eval_dataset" in keys.carried:
        keys.note("val_size", "data.eval names the held-out rows already")
    elif isinstance(share, (int, float)) and share < 1:
        keys.take("val_size", "data.eval", float(share))
    else:
        keys.set("data.eval", 0.0)  # LlamaFactory holds nothing out unless asked to
        keys.note("val_size", "data.eval: a share below 1, or rows of their own")


def _weights(keys: Keys, sources: list[dict[str, Any]], key: str) -> None:
    if key != "dataset":
        return
    value = keys.get("interleave_probs")
    parts = common.names_of(value) if isinstance(value, str) else value if isinstance(value, list) else []
    try:
        odds = [float(part) for part in parts]
    except (TypeError, ValueError):
        odds = []
    if len(odds) == len(sources) and all(common.positive(part, 0) for part in odds):
        total = sum(odds)
        for source, part in zip(sources, odds, strict=True):
            source["weight"] = round(part / total * len(sources), 4)
        keys.carried["interleave_probs"] = "data.train"
        keys.note(
            "interleave_probs",
            "weights of the sources: how often the rows of each are seen, not the odds of drawing one",
        )
    elif value is not None:
        keys.note("interleave_probs", "`weight` of each source of data.train")
    if "mix_strategy" in keys.tree:
        keys.note("mix_strategy", "sources are joined and shuffled; `weight` of each says how often its rows are seen")


_COLUMNS = {  # of dataset_info.json -> ours, by layout
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}


def _source(name: str, info: dict[str, Any], place: str, objective: str) -> dict[str, Any]:
    entry = info.get(name)
    if not isinstance(entry, dict):
        return {"path": f"{place}/{name}.json"}
    out: dict[str, Any] = {"path": str(entry.get("hf_hub_url") or f"{place}/{entry.get('file_name', name)}")}
    for key in ("subset", "split"):
        if entry.get(key):
            out[key] = entry[key]
    layout = "sharegpt" if entry.get("formatting") == "sharegpt" else "alpaca"
    ours = dict(_COLUMNS[layout])
    theirs = dict(entry.get("columns") or {})
    if objective == "pretrain":
        out["format"], ours = "text", {"prompt": "text"}
    elif entry.get("ranking"):
        out["format"], ours = (
            "preference",
            {"prompt": "prompt", "messages": "prompt", "chosen": "chosen", "rejected": "rejected"},
        )
        if layout == "alpaca":
            theirs = {"prompt": "instruction"} | theirs
    elif objective == "kto":
        out["format"], ours = (
            "kto",
            {"messages": "messages", "kto_tag": "label", "prompt": "prompt", "response": "completion"},
        )
    else:
        out["format"] = layout
    columns = {ours[key]: value for key, value in theirs.items() if key in ours and value and ours[key] != value}
    return out | ({"columns": columns} if columns else {})
