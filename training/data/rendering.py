"""Which chat template is used, and rendering with it through the tokenizer itself.

Rendering is transformers' own (`apply_chat_template`), so that what is trained is what an inference server will send.
Left out: where the assistant's turns lie in the text (`spans.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...launcher.errors import DataError, did_you_mean
from .readers import RowError
from .turns import Chat, Message

# The .jinja files of this folder, with the tokens that must be single tokens of the tokenizer for them to make sense.
NAMED: dict[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>"), "alpaca": ()}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A template and the tokenizer whose special tokens fill it. `origin` is how messages to the user call it."""

    tokenizer: Any
    template: str
    origin: str

    @property
    def marks(self) -> bool:
        """The template itself marks the assistant's part with `{% generation %}`."""
        return bool(_MARKS.search(self.template))

    def render(
        self, turns: Sequence[list[Message]], tools: Sequence[list[Any] | None], *, prompt: bool = False
    ) -> list[str | RowError]:
        """Texts of conversations; `prompt` adds what asks the model to answer. A template that refuses gives a
        RowError."""
        if not turns:
            return []
        if not any(tools):
            try:  # one call for all of them; only if one is refused, one by one
                return self._apply(list(turns), None, prompt)
            except Exception as error:  # a template can raise anything, and a user wrote it
                self._check_syntax(error)
        return [self._one(messages, tool, prompt) for messages, tool in zip(turns, tools, strict=True)]

    def render_marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """Text and the character spans of its `{% generation %}` blocks. Raises what the template raises."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(  # annotated as str, and a pair
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return rendered[0][0], [(start, stop) for start, stop in rendered[1][0]]

    def refusal(self, chat: Chat, error: Exception) -> RowError:
        """Names the first turn at which the template refuses with this error, if one can be singled out."""
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        for count in range(1, len(chat.messages) + 1):
            try:
                self._apply([chat.messages[:count]], chat.tools, False)
            except Exception as again:  # see render
                if str(again) == str(error):
                    role = chat.messages[count - 1]["role"]
                    return RowError(f"{self.origin} fails on role '{role}' (message {count}): {reason}")
        return RowError(f"{self.origin} fails: {reason}")

    def _one(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str | RowError:
        try:
            return self._apply([messages], tools, prompt)[0]
        except Exception as error:  # see render
            self._check_syntax(error)
            return self.refusal(Chat(messages=messages, tools=tools), error)

    def _apply(self, turns: list[list[Message]], tools: list[Any] | None, prompt: bool) -> list[Any]:
        return self.tokenizer.apply_chat_template(
            turns, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )

    def _check_syntax(self, error: Exception) -> None:
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            raise DataError(f"{self.origin}, line {error.lineno}: not a Jinja template: {error.message}.") from None


def find_template(choice: str | None, tokenizer: Any, tokenizer_id: str) -> Renderer | None:
    """The Renderer for `data.chat_template`, or None when nothing was chosen and the tokenizer has none. Raises
    DataError."""
    own = tokenizer.chat_template
    own = own if isinstance(own, dict) else {"default": own} if own else {}
    if choice is None:
        if not own:
            return None
        template = own.get("default") or next(iter(own.values()))
        return Renderer(tokenizer=tokenizer, template=template, origin=f"the chat template of {tokenizer_id}")
    path = Path(choice).expanduser()
    if path.is_file():
        try:
            return Renderer(
                tokenizer=tokenizer, template=path.read_text(encoding="utf-8"), origin=f"the template {choice}"
            )
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {choice} cannot be read: {error}.") from None
    if choice in NAMED:
        if missing := [token for token in NAMED[choice] if token not in tokenizer.get_vocab()]:
            raise DataError(
                f"data.chat_template: {choice} writes {missing[0]}, which is no token of {tokenizer_id}: the model "
                f"would see it in pieces. Use alpaca, which ends turns with the tokenizer's own EOS, or a Jinja file."
            )
        text = (Path(__file__).parent / f"{choice}.jinja").read_text(encoding="utf-8")
        return Renderer(tokenizer=tokenizer, template=text, origin=f"the template {choice}")
    if choice in own:
        return Renderer(
            tokenizer=tokenizer, template=own[choice], origin=f"the chat template '{choice}' of {tokenizer_id}"
        )
    raise DataError(
        f"data.chat_template: {choice!r} is neither a file nor the name of a template"
        f"{did_you_mean(choice, [*NAMED, *own]) or '; ' + ', '.join([*NAMED, *own])}"
    )
