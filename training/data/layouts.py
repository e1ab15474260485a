"""Rows of the layouts people keep data in, turned into two kinds of sample: a chat, or plain text.

    messages            messages: [{role, content, …}], optionally tools
    prompt-completion   prompt, completion: both text, or both lists of messages
    alpaca              instruction, output, optionally input, system, history
    sharegpt            conversations: [{from, value}], optionally system, tools
    text                text

The layout is recognised once for a source, from the columns of its first row; every later row must have it too. Left
out: preference pairs and rows that are tokenized already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...launcher.errors import DataError, did_you_mean
from .readers import RowError

REQUIRED = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
OPTIONAL = {"messages": ("tools",), "alpaca": ("input", "system", "history"), "sharegpt": ("system", "tools")}
OURS = sorted({name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names})
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_SPEAKERS |= {
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Turns for a chat template. Assistant turns before `first_trained` are context and carry no loss."""

    messages: list[Message]
    first_trained: int = 0
    tools: list[Any] | None = None

    def trained(self) -> list[int]:
        """Indices of the turns that carry loss."""
        return [i for i, m in enumerate(self.messages) if i >= self.first_trained and m["role"] == "assistant"]

    def keys(self) -> tuple[int, int]:
        """64-bit hashes of the prompt (all before the first trained turn) and of the whole."""
        digest = _hash(self.tools) if self.tools else _hash()
        first, prompt = self.trained()[0], 0
        for i, message in enumerate(self.messages):
            if i == first:
                prompt = _number(digest)
            digest.update(_bytes(message))
        return prompt, _number(digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """Text without a template. An empty prompt means that all of it carries loss."""

    prompt: str
    completion: str

    def keys(self) -> tuple[int, int]:
        whole = _number(_hash(self.prompt, self.completion))
        return (_number(_hash(self.prompt)) if self.prompt else whole), whole


Example = Chat | Plain


def recognise(columns: Collection[str], wanted: str, *, pretrain: bool, source: str) -> str:
    """The layout's name. Raises DataError when the columns fit none, or not the one that was named."""
    if pretrain:
        if wanted not in ("auto", "text"):
            raise DataError(f"{source}: objective pretrain reads plain text, not format {wanted}; set objective: sft.")
        wanted = "text"
    found = ", ".join(sorted(columns)) or "none"
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
            f"{source}: these are preference pairs (columns: {found}); objective sft reads messages, or prompt and "
            f"completion: map them with columns: {{completion: chosen}}."
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
    return _chat(_turns(row["messages"], "messages"), tools=row.get("tools"))


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        parsed = _decoded(prompt), _decoded(completion)
        if all(isinstance(part, list) and all("role" in turn for turn in part) for part in parsed):
            prompt, completion = parsed  # lists of messages out of a CSV; any other JSON is text to be learnt
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowError("completion is empty")
        return Plain(prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _turns(prompt, "prompt") if prompt else []
        return _chat(before + _turns(completion, "completion"), first_trained=len(before), tools=row.get("tools"))
    raise RowError("prompt and completion must both be text or both be lists of messages")


def _alpaca(row: Mapping[str, Any]) -> Chat:
    turns = [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []
    for pair in _decoded(row.get("history"), list) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history must be a list of [question, answer]")
        turns += [
            {"role": "user", "content": _text(pair[0], "history")},
            {"role": "assistant", "content": _text(pair[1], "history")},
        ]
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row["output"], "output")}]
    return _chat(turns)


def _sharegpt(row: Mapping[str, Any]) -> Chat:
    talk = _decoded(row["conversations"])
    if isinstance(talk, list) and talk and isinstance(talk[0], dict) and "role" in talk[0]:
        return _chat(_turns(talk, "conversations"), tools=row.get("tools"))
    if not isinstance(talk, list):
        raise RowError("conversations must be a list")
    turns = [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []
    for i, turn in enumerate(talk, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowError(f"turn {i} of conversations needs from and value")
        if turn["from"] not in _SPEAKERS:
            raise RowError(f"turn {i} is from {turn['from']!r}; known: {', '.join(_SPEAKERS)}")
        turns.append({"role": _SPEAKERS[turn["from"]], "content": _text(turn["value"], f"value of turn {i}")})
    return _chat(turns, tools=row.get("tools"))


def _plain_text(row: Mapping[str, Any]) -> Plain:
    text = _text(row["text"], "text")
    if not text.strip():
        raise RowError("text is empty")
    return Plain(prompt="", completion=text)


_CONVERT = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}


def _turns(value: Any, column: str) -> list[Message]:
    """Checked copies of messages; keys that are null (Parquet fills them in) are left out."""
    value = _decoded(value)
    if not isinstance(value, list) or not value:
        raise RowError(
            f"{column} must be a list of messages" if not isinstance(value, list) else f"{column} is an empty list"
        )
    turns = []
    for i, item in enumerate(value, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise RowError(f"message {i} of {column} needs a role and a content")
        message = {key: part for key, part in item.items() if part is not None}
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part, i) for part in content)
        elif content is None and message.get("tool_calls"):
            content = ""
        elif not isinstance(content, str):
            raise RowError(
                f"message {i} ({item['role']}) has no content"
                if content is None
                else f"content of message {i} is not text"
            )
        turns.append(message | {"content": content})
    return turns


def _chat(turns: list[Message], first_trained: int = 0, tools: Any = None) -> Chat:
    for i, message in enumerate(turns, start=1):
        if message["role"] != "system" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(f"message {i} ({message['role']}) is empty")
    tools = _decoded(tools) or None
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools must be a list")
    chat = Chat(messages=turns, first_trained=first_trained, tools=tools)
    if not chat.trained():
        raise RowError(
            "no assistant turn" + (" in the completion" if first_trained else "") + ", so nothing to learn from"
        )
    return chat


def _decoded(value: Any, of: type = dict) -> Any:
    """CSV holds lists as JSON text; anything that is not a list of dicts (or lists) comes back as it is."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) and all(isinstance(item, of) for item in parsed) else value
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column} is not text")
    return value


def _text_part(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RowError(f"message {number} has a part that is not text")


def _hash(*values: Any) -> Any:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(_bytes(value))
    return digest


def _bytes(value: Any) -> bytes:
    """Equal for values that are equal as JSON. Raises UnicodeEncodeError for half a surrogate pair."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8")


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")
