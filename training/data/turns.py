"""Turns of a conversation, checked, and the two kinds of sample that every layout becomes: a chat, or plain text.

Left out: which columns of a row hold what (`layouts.py`, `preferences.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from .readers import RowError

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

FLAGS = ("train", "weight")  # keys of a message that say whether it carries loss

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Turns for a chat template. A turn carries loss when its role is one of `roles`, unless `flags` says otherwise of it;
    turns before `first_trained` are context and never do."""

    messages: list[Message]
    first_trained: int = 0
    tools: list[Any] | None = None
    roles: tuple[str, ...] = ("assistant",)
    flags: dict[int, bool] = field(default_factory=dict)

    def trained(self) -> list[int]:
        """Indices of the turns that carry loss."""
        wanted = [self.flags.get(i, m["role"] in self.roles) for i, m in enumerate(self.messages)]
        return [i for i in range(self.first_trained, len(wanted)) if wanted[i]]

    def check(self) -> None:
        """Raises RowError when no turn carries loss."""
        if not self.trained():
            names = " or ".join(self.roles)
            where = " after the prompt" if self.first_trained else ""
            raise RowError(
                f"no {names} turn{where}{' that is to be trained' if self.flags else ''}, so nothing to learn from"
            )

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


def turns_of(value: Any, column: str, first: int = 1) -> list[Message]:
    """Checked copies of messages; keys that are null (Parquet fills them in) are left out."""
    value = decoded(value)
    if not isinstance(value, list) or not value:
        raise RowError(
            f"{column} must be a list of messages" if not isinstance(value, list) else f"{column} is an empty list"
        )
    turns = []
    for i, item in enumerate(value, start=first):
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


def speaker(turn: Any, number: int, column: str = "conversations") -> Message:
    """A message from one in OpenAI's form, or in ShareGPT's: from and value."""
    if isinstance(turn, dict) and "role" in turn:
        return turns_of([turn], column, number)[0]
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RowError(f"turn {number} of {column} needs from and value")
    if turn["from"] not in _SPEAKERS:
        raise RowError(f"turn {number} is from {turn['from']!r}; known: {', '.join(_SPEAKERS)}")
    said = {"role": _SPEAKERS[turn["from"]], "content": text(turn["value"], f"value of turn {number}")}
    return said | {key: turn[key] for key in FLAGS if turn.get(key) is not None}


def chat(turns: list[Message], first_trained: int = 0, tools: Any = None) -> Chat:
    """A checked chat of turns that `turns_of` or `speaker` made. Raises RowError."""
    for i, message in enumerate(turns, start=1):
        if message["role"] != "system" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(f"message {i} ({message['role']}) is empty")
    tools = decoded(tools) or None
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools must be a list")
    flags = {i: flag for i, message in enumerate(turns) if (flag := _flag(message, i + 1)) is not None}
    clean = [{key: value for key, value in message.items() if key not in FLAGS} for message in turns]
    return Chat(messages=clean, first_trained=first_trained, tools=tools, flags=flags)


def _flag(message: Message, number: int) -> bool | None:
    """What a turn says of itself: `train: false`, or OpenAI's `weight: 0`."""
    for name in FLAGS:
        if name in message:
            if message[name] not in (True, False, 0, 1):
                raise RowError(f"{name} of message {number} is {message[name]!r}; it must be true or false")
            return bool(message[name])
    return None


def decoded(value: Any, of: type = dict) -> Any:
    """CSV holds lists as JSON text; anything that is not a list of dicts (or lists) comes back as it is."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) and all(isinstance(item, of) for item in parsed) else value
    return value


def text(value: Any, column: str) -> str:
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


def number_of(*values: Any) -> int:
    """A 64-bit hash of anything that JSON can write."""
    return _number(_hash(*values))
