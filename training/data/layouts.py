"""Rows of the layouts people keep data in, turned into two kinds of sample: a chat, or plain text.

    messages            messages: [{role, content, …}], optionally tools
    prompt-completion   prompt, completion: both text, or both lists of messages
    alpaca              instruction, output, optionally input, system, history
    sharegpt            conversations: [{from, value}], optionally system, tools
    text                text

The layout is recognised once for a source, from the columns of its first row; every later row must have it too.
Preference pairs and labelled answers are `preferences.py`'s. Left out: rows that are tokenized already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...launcher.errors import DataError, did_you_mean
from .readers import RowError
from .turns import Chat, Example, Plain, chat, decoded, speaker, text, turns_of

REQUIRED = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
OPTIONAL = {"messages": ("tools",), "alpaca": ("input", "system", "history"), "sharegpt": ("system", "tools")}
OURS = sorted(
    {name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names}
    | {"chosen", "rejected", "label", "kto_tag"}
)


def recognise(columns: Collection[str], wanted: str, *, kind: str, source: str) -> str:
    """The layout's name; `kind` of rows is sft or pretrain. Raises DataError when the columns fit none, or not the one
    that was named."""
    if kind == "pretrain":
        if wanted not in ("auto", "text"):
            raise DataError(f"{source}: objective pretrain reads plain text, not format {wanted}; set objective: sft.")
        wanted = "text"
    found = ", ".join(sorted(columns)) or "none"
    if wanted not in ("auto", *REQUIRED):
        raise DataError(f"{source}: format {wanted} is read by the objectives that compare answers, not by sft.")
    if wanted != "auto":
        if missing := [name for name in REQUIRED[wanted] if name not in columns]:
            raise DataError(
                f"{source}: {wanted} needs the column {missing[0]}, found: {found}. Name the file's own column for "
                f"it with columns: {{{missing[0]}: NAME}}."
            )
        return wanted
    for name, needed in REQUIRED.items():
        if all(column in columns for column in needed):
            return name
    if {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{source}: these are preference pairs (columns: {found}); set objective: dpo, or for sft on the chosen "
            f"answers columns: {{completion: chosen}}."
        )
    layouts = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in REQUIRED.items())
    raise DataError(
        f"{source}: the columns ({found}) fit no known layout ({layouts}). Say which of yours is which, for example "
        f"columns: {{prompt: NAME, completion: NAME}}."
    )


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`columns` maps our name to the file's; a renamed column hides one of the file's that has our name."""
    taken = set(columns.values())
    out = {name: value for name, value in row.items() if name not in taken}
    return out | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def check_columns(columns: Mapping[str, str], source: str) -> None:
    for name in columns:
        if name not in OURS:
            raise DataError(
                f"{source}: columns.{name}: not a name we use{did_you_mean(name, OURS)} (all: {', '.join(OURS)})."
            )


def convert(row: Mapping[str, Any], layout: str) -> Example:
    """One row, columns renamed already. Raises RowError."""
    for name in REQUIRED[layout]:
        if row.get(name) is None:
            raise RowError(f"column {name} is missing" if name not in row else f"column {name} is null")
    return _CONVERT[layout](row)


def _messages(row: Mapping[str, Any]) -> Chat:
    return chat(turns_of(row["messages"], "messages"), tools=row.get("tools"))


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        parsed = decoded(prompt), decoded(completion)
        if all(isinstance(part, list) and all("role" in turn for turn in part) for part in parsed):
            prompt, completion = parsed  # lists of messages out of a CSV; any other JSON is text to be learnt
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowError("completion is empty")
        return Plain(prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = turns_of(prompt, "prompt") if prompt else []
        return chat(before + turns_of(completion, "completion"), first_trained=len(before), tools=row.get("tools"))
    raise RowError("prompt and completion must both be text or both be lists of messages")


def _alpaca(row: Mapping[str, Any]) -> Chat:
    turns = [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []
    for pair in decoded(row.get("history"), list) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history must be a list of [question, answer]")
        turns += [
            {"role": "user", "content": text(pair[0], "history")},
            {"role": "assistant", "content": text(pair[1], "history")},
        ]
    question = text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + text(row["input"], "input")
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text(row["output"], "output")}]
    return chat(turns)


def _sharegpt(row: Mapping[str, Any]) -> Chat:
    talk = decoded(row["conversations"])
    if isinstance(talk, list) and talk and isinstance(talk[0], dict) and "role" in talk[0]:
        return chat(turns_of(talk, "conversations"), tools=row.get("tools"))
    if not isinstance(talk, list):
        raise RowError("conversations must be a list")
    turns = [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []
    turns += [speaker(turn, i) for i, turn in enumerate(talk, start=1)]
    return chat(turns, tools=row.get("tools"))


def _plain_text(row: Mapping[str, Any]) -> Plain:
    document = text(row["text"], "text")
    if not document.strip():
        raise RowError("text is empty")
    return Plain(prompt="", completion=document)


_CONVERT = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}
