"""axolotl's data sets: paths, the types that say how a row is put together, splits, and which roles are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import convert_common as common
from .convert import Keys, shown

# axolotl's `type` of a data set, up to the first dot or the whole -> our format
_TYPES = {
    "alpaca": "alpaca",
    "alpaca_chat": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "auto",
    "completion": "text",
    "pretrain": "text",
    "input_output": "prompt-completion",
}
_PAIRS = {  # the loaders of pairs: (prompt, chosen, rejected) as the file calls them
    "intel": ("question", "chosen", "rejected"),
    "argilla": ("instruction", "chosen_response", "rejected_response"),
    "argilla_chat": ("prompt", "chosen", "rejected"),
    "icr": ("input", "chosen", "rejected"),
    "ultra": ("prompt", "chosen", "rejected"),
    "prompt_pairs": ("prompt", "chosen", "rejected"),
    "default": ("prompt", "chosen", "rejected"),
}


def read_data(keys: Keys, objective: str) -> None:
    plain: list[bool] = []
    for key, to in (("pretraining_dataset", "data.train"), ("datasets", "data.train"), ("test_datasets", "data.eval")):
        entries = keys.get(key)
        if not entries:
            continue
        made = []
        listed = entries if isinstance(entries, list) else [entries]
        if not all(isinstance(entry, (str, Mapping)) for entry in listed):
            keys.note(key, f"{to}: paths, or keys and values of sources")
            continue
        for entry in listed:
            entry = {"path": entry} if isinstance(entry, str) else dict(entry)
            made.append(source := _source(keys, key, entry, objective))
            if to == "data.train":
                plain.append(source.get("format") == "text" or key == "pretraining_dataset")
        keys.take(key, to, made)
    if plain and all(plain) and objective == "sft":
        keys.set("objective.name", "pretrain")
        for source in keys.out["data"]["train"]:
            source["format"] = "text"
    if isinstance(share := keys.get("val_set_size"), (int, float)):
        if "test_datasets" in keys.carried:
            keys.note("val_set_size", "data.eval names the held-out rows already")
        elif share < 1:
            keys.take("val_set_size", "data.eval", float(share))
        else:
            keys.note("val_set_size", "data.eval: a share below 1, or rows of their own")
    elif "test_datasets" not in keys.carried:
        keys.set("data.eval", 0.0)  # axolotl holds nothing out unless asked to
    everything = keys.get("train_on_inputs")
    pairs = objective in ("dpo", "orpo", "simpo", "kto", "reward")
    if isinstance(everything, bool) and not pairs:
        plain_text = keys.out.get("objective", {}).get("name") == "pretrain"
        keys.take("train_on_inputs", "data.train_on", "all" if everything and not plain_text else "assistant")
    elif everything is not None:
        keys.note("train_on_inputs", "objectives that compare answers train those alone")
    if (roles := common.names_of(keys.get("roles_to_train"))) and not pairs:
        keys.take("roles_to_train", "data.train_on", "assistant" if roles in (["assistant"], ["gpt"]) else roles)


def _source(keys: Keys, key: str, entry: dict[str, Any], objective: str) -> dict[str, Any]:
    """One entry of `datasets`; what it holds beyond ours goes into the line of the whole key."""
    files = entry.pop("data_files", None)
    kind = entry.pop("ds_type", None)
    path = str(entry.pop("path", ""))
    out: dict[str, Any] = {"path": path}
    left: dict[str, Any] = {}
    if files:
        names = [files] if isinstance(files, str) else list(files)
        out["path"] = str(names[0])
        if len(names) > 1:
            left["data_files"] = "one file a source: name the others as sources of their own"
    elif path in ("json", "csv", "parquet", "text") or kind == "text":
        left["ds_type"] = "path: the file itself"
    if entry.get("name"):
        out["subset"] = str(entry.pop("name"))
    if entry.get("split"):
        out["split"] = str(entry.pop("split"))
    columns: dict[str, str] = {}
    kind = entry.pop("type", None)
    if isinstance(kind, Mapping):
        _custom(kind, columns, out, left, objective)
    elif kind is not None:
        _named(str(kind), columns, out, left, objective)
    messages = entry.pop("field_messages", None)
    if messages and messages not in ("messages", "conversations"):
        columns["messages"] = str(messages)
    for theirs, ours in (
        ("field_chosen", "chosen"),
        ("field_rejected", "rejected"),
        ("field", "text"),
        ("text_column", "text"),
    ):
        if (name := entry.pop(theirs, None)) and name != ours:
            columns[ours] = str(name)
    roles = entry.pop("roles_to_train", None)
    if roles and roles != ["assistant"]:
        left["roles_to_train"] = "data.train_on, for all sources"
    for name, value in entry.items():
        if value not in (None, "", [], {}):
            left[name] = _ENTRY.get(name, "no such key of a source")
    if columns:
        out["columns"] = columns
    if left:
        told = "; ".join(f"{name}: {why}" for name, why in left.items())
        before = keys.lines.get(key)
        keys.lines[key] = f"{before}; {told}" if before else f"{key}: of {shown(path)}: {told}"
    return out


_ENTRY = {
    "message_property_mappings": "messages have role and content, or from and value",
    "message_field_role": "messages have role and content, or from and value",
    "message_field_content": "messages have role and content, or from and value",
    "message_field_training": "`train: false` in a message",
    "roles": "roles are user, assistant, system and tool, or ShareGPT's names for them",
    "drop_system_message": "take it out of the rows",
    "conversation": "data.chat_template",
    "chat_template": "data.chat_template, for all sources",
    "chat_template_jinja": "data.chat_template: save it as a file and name that",
    "shards": "weight: 0.5 takes a random half",
    "shards_idx": "weight: 0.5 takes a random half",
    "preprocess_shards": "`trebuchet data prepare --shards N --shard I`",
    "train_on_split": "split",
    "revision": "the Hub's newest",
    "trust_remote_code": "rows are read, no code is run",
    "train_on_eos": "the end token after every trained turn carries loss",
    "skip": "write a file without the rows",
    "field_tools": "tools is the name of the column",
    "field_system": "system is the name of the column",
    "split_thinking": "reasoning_content in a message",
}


def _named(kind: str, columns: dict[str, str], out: dict[str, Any], left: dict[str, Any], objective: str) -> None:
    first, _, loader = kind.replace(":", ".").partition(".")
    if objective == "kto":
        out["format"] = "kto"
    elif objective in ("dpo", "orpo", "simpo", "reward"):
        out["format"] = "preference"
        prompt, chosen, rejected = _PAIRS.get(loader, _PAIRS.get(first, _PAIRS["default"]))
        names = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        columns |= {ours: theirs for ours, theirs in names.items() if ours != theirs}
    elif first in _TYPES:
        if _TYPES[first] != "auto":
            out["format"] = _TYPES[first]
    else:
        left["type"] = f"format: auto; {kind} has no counterpart by name"


def _custom(
    kind: Mapping[str, Any], columns: dict[str, str], out: dict[str, Any], left: dict[str, Any], objective: str
) -> None:
    """A `type` written out: fields, and how they are put together."""
    names = {
        "field_prompt": "prompt",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "field_label": "label",
        "field_instruction": "instruction",
        "field_input": "input",
        "field_output": "output",
        "field_completion": "completion",
        "field_system": "system",
    }
    for theirs, value in kind.items():
        if theirs in names and value:
            if names[theirs] != value:
                columns[names[theirs]] = str(value)
        elif value not in (None, ""):
            left[f"type.{theirs}"] = "data.chat_template decides how a row is put together"
    if objective in ("dpo", "orpo", "simpo", "reward"):
        out["format"] = "preference"
    elif objective == "kto":
        out["format"] = "kto"
    else:
        out["format"] = "alpaca"
