"""Where the turns that carry loss lie in a rendered conversation, as character spans.

Three ways, tried in this order, and a row for which none holds is refused; nothing ever falls back to "everything":
  generation    the template's own `{% generation %}` blocks
  incremental   turn k is what lies between the rendering of turns 0..k-1 with the generation prompt and that of turns
  0..k;
                both must be prefixes of the whole, and the part between must begin with the turn's content
  sentinel      every content replaced by a unique word; the skeleton with the real contents put back (as they are, or
                stripped) must equal the real rendering
A span ends with the end token: the first special token after the content. Template text after it (the newline of
ChatML) is not something the model has to produce, so it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .layouts import Chat, Message
from .readers import RowError
from .rendering import Renderer

_WORD = "qZ{}xJw"
_WORDS = re.compile(r"qZ(\d+)xJw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """Text as the model sees it; `spans` are (start, stop) of the trained turns, in order, the end token included."""

    text: str
    spans: list[tuple[int, int]]
    method: str


def find_spans(chats: Sequence[Chat], renderer: Renderer, specials: tuple[str, ...]) -> list[Rendered | RowError]:
    """One result per chat, in order. `specials` are the tokenizer's special tokens, longest first."""
    if renderer.marks:
        return [_by_generation(chat, renderer, specials) for chat in chats]
    whole = renderer.render([c.messages for c in chats], [c.tools for c in chats])
    places = [(i, k) for i, chat in enumerate(chats) if isinstance(whole[i], str) for k in chat.trained()]
    tools = [chats[i].tools for i, _ in places]
    before = renderer.render([chats[i].messages[:k] for i, k in places], tools, prompt=True)
    inner = [(i, k) for i, k in places if k + 1 < len(chats[i].messages)]
    parts = renderer.render([chats[i].messages[: k + 1] for i, k in inner], [chats[i].tools for i, _ in inner])
    upto = dict(zip(inner, parts, strict=True))
    found: dict[int, list[tuple[int, int]] | None] = {}
    for (i, k), start in zip(places, before, strict=True):
        span = _between(whole[i], start, upto.get((i, k), whole[i]), chats[i].messages[k], specials)
        spans = found.setdefault(i, [])
        found[i] = None if span is None or spans is None else [*spans, span]
    out: list[Rendered | RowError] = []
    for i, (chat, text) in enumerate(zip(chats, whole, strict=True)):
        if isinstance(text, RowError):
            out.append(text)
        elif (spans := found[i]) is not None:
            out.append(Rendered(text=text, spans=spans, method="incremental"))
        else:
            out.append(_by_sentinel(chat, text, renderer, specials))
    return out


def _between(
    whole: str | RowError, before: str | RowError, upto: str | RowError, turn: Message, specials: tuple[str, ...]
) -> tuple[int, int] | None:
    if not (isinstance(whole, str) and isinstance(before, str) and isinstance(upto, str)):
        return None  # a template may refuse half a conversation that it takes whole
    if not (upto.startswith(before) and whole.startswith(upto)):
        return None
    produced = upto[len(before) :]
    content = turn["content"].strip()
    extra = any(turn.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    if content not in produced if extra else not produced.lstrip().startswith(content):
        return None
    return len(before), _end(whole, len(before), len(upto), specials)


def _end(text: str, start: int, stop: int, specials: tuple[str, ...]) -> int:
    """Where the end token of text[start:stop] ends: the first of the run of special tokens at its end. None: where
    the text does."""
    stop = start + len(text[start:stop].rstrip())
    end = stop
    while text.endswith(specials, start, stop):
        end = stop
        stop -= next(len(token) for token in specials if text.endswith(token, start, stop))
        stop = start + len(text[start:stop].rstrip())
    return end


def _by_generation(chat: Chat, renderer: Renderer, specials: tuple[str, ...]) -> Rendered | RowError:
    try:
        text, blocks = renderer.render_marked(chat)
    except Exception as error:  # a template can raise anything
        return renderer.refusal(chat, error)
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if len(blocks) != len(turns):
        return RowError(
            f"{renderer.origin} marks {len(blocks)} {{% generation %}} blocks for {len(turns)} assistant turns"
        )
    spans = []
    for turn, (start, stop) in zip(turns, blocks, strict=True):
        if turn >= chat.first_trained:
            if chat.messages[turn]["content"].strip() not in text[start:stop]:
                return RowError(f"the {{% generation %}} block of message {turn + 1} does not hold its content")
            spans.append((start, _end(text, start, stop, specials)))
    return Rendered(text=text, spans=spans, method="generation")


def _by_sentinel(chat: Chat, text: str, renderer: Renderer, specials: tuple[str, ...]) -> Rendered | RowError:
    words = [m | {"content": _WORD.format(i)} if m["content"] else m for i, m in enumerate(chat.messages)]
    skeleton = renderer.render([words], [chat.tools])[0]
    trained, spans = set(chat.trained()), []
    if isinstance(skeleton, str):
        pieces = _WORDS.split(skeleton)
        at = len(pieces[0])
        ok = text.startswith(pieces[0])
        for number, after in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            content = chat.messages[number]["content"] if number < len(chat.messages) else ""
            written = next((c for c in _variants(content) if text.startswith(c + after, at)), None)
            if written is None:
                ok = False
                break
            if number in trained:
                spans.append((at, _after(text, at + len(written), specials)))
            at += len(written) + len(after)
        if ok and at == len(text) and len(spans) == len(trained):
            return Rendered(text=text, spans=spans, method="sentinel")
    return RowError(
        f"cannot tell where the assistant's turns lie under {renderer.origin}: it changes earlier turns or their "
        f"contents. Mark them with {{% generation %}} in a Jinja file named in data.chat_template, or set "
        f"data.train_on: all"
    )


def _after(text: str, at: int, specials: tuple[str, ...]) -> int:
    """Past the special token that follows at `at`, white space between allowed; `at` itself when there is none."""
    token_at = at + len(text[at:]) - len(text[at:].lstrip())
    return next((token_at + len(token) for token in specials if text.startswith(token, token_at)), at)


def _variants(content: str) -> tuple[str, ...]:
    return content, content.strip(), content.lstrip(), content.rstrip()
