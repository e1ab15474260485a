"""Where the turns that carry loss lie in a rendered conversation, as character spans.

Three ways, tried in this order, and a row for which none holds is refused; nothing ever falls back to "everything":
  generation    the template's own `{% generation %}` blocks
  incremental   turn k is what lies between the rendering of turns 0..k-1 with the generation prompt and that of turns
                0..k; both must be prefixes of the whole, and the part between must begin with the turn's content
  sentinel      for the turns not found so: every content replaced by a unique word; the skeleton with the real contents
                put back (as they are, or stripped) must equal the real rendering
A span ends with the end token: the first special token after the content. Template text after it (the newline of
ChatML) is not something the model has to produce, so it is left out.

Rendering costs more than anything else here, so the last two are worked out once per sequence of roles, on the unique
words, and carried over to every row whose rendering fits that skeleton letter by letter; the others go one by one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType

from .readers import RowError
from .rendering import Renderer
from .turns import Chat, Message

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message that templates write before its content
_WORD = "qZ{}xJw"
_WORDS = re.compile(r"qZ(\d+)xJw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """Text as the model sees it; `spans` are (start, stop) of the trained turns, in order, the end token included."""

    text: str
    spans: list[tuple[int, int]]
    method: str


class SpanFinder:
    """Finds spans under one template. `specials` are the tokenizer's special tokens, longest first."""

    def __init__(self, renderer: Renderer, specials: tuple[str, ...]):
        self.renderer, self.specials = renderer, specials
        self._skeletons: dict[tuple[object, ...], _Skeleton | None] = {}

    def find(self, chats: Sequence[Chat]) -> list[Rendered | RowError]:
        """One result per chat, in order."""
        if self.renderer.marks and all(map(_answers_only, chats)):
            return [_by_generation(chat, self.renderer, self.specials) for chat in chats]
        texts = self.renderer.render([c.messages for c in chats], [c.tools for c in chats])
        out: dict[int, Rendered | RowError] = {}
        for i, (chat, text) in enumerate(zip(chats, texts, strict=True)):
            if isinstance(text, RowError):
                out[i] = text
            elif found := self._fitted(chat, text):
                out[i] = found
        rest = [i for i in range(len(chats)) if i not in out]
        slow = one_by_one([chats[i] for i in rest], [str(texts[i]) for i in rest], self.renderer, self.specials)
        out |= zip(rest, slow, strict=True)
        return [out[i] for i in range(len(chats))]

    def _fitted(self, chat: Chat, text: str) -> Rendered | None:
        if chat.tools or any(len(message) != 2 for message in chat.messages):
            return None  # tool calls, reasoning and names make skeletons of their own
        key = (*chat.trained(), None, *((m["role"], bool(m["content"])) for m in chat.messages))
        if key not in self._skeletons:
            self._skeletons[key] = _skeleton(chat, self.renderer, self.specials)
        skeleton = self._skeletons[key]
        return skeleton.fit(chat, text) if skeleton else None


def _answers_only(chat: Chat) -> bool:
    """Only what the generation prompt asks for is found by it, or marked by a template; other roles by their words."""
    return all(chat.messages[i]["role"] == "assistant" for i in chat.trained())


def one_by_one(
    chats: Sequence[Chat], texts: Sequence[str], renderer: Renderer, specials: tuple[str, ...]
) -> list[Rendered | RowError]:
    """Incremental, else sentinel, each row for itself; `texts` are the rendered chats."""
    places = [(i, k) for i, chat in enumerate(chats) if _answers_only(chat) for k in chat.trained()]
    tools = [chats[i].tools for i, _ in places]
    before = renderer.render([chats[i].messages[:k] for i, k in places], tools, prompt=True)
    inner = [(i, k) for i, k in places if k + 1 < len(chats[i].messages)]
    parts = renderer.render([chats[i].messages[: k + 1] for i, k in inner], [chats[i].tools for i, _ in inner])
    upto = dict(zip(inner, parts, strict=True))
    found: dict[int, dict[int, tuple[int, int]]] = {i: {} for i in range(len(chats))}
    for (i, k), start in zip(places, before, strict=True):
        span = _between(texts[i], start, upto.get((i, k), texts[i]), chats[i].messages[k], specials)
        if span is not None:
            found[i][k] = span
    out: list[Rendered | RowError] = []
    for i, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        if len(found[i]) == len(chat.trained()):
            out.append(Rendered(text=text, spans=[found[i][k] for k in chat.trained()], method="incremental"))
        else:
            out.append(_by_sentinel(chat, text, renderer, specials, found[i]))
    return out


def _between(
    whole: str, before: str | RowError, upto: str | RowError, turn: Message, specials: tuple[str, ...]
) -> tuple[int, int] | None:
    if not (isinstance(before, str) and isinstance(upto, str)):
        return None  # a template may refuse half a conversation that it takes whole
    if not (upto.startswith(before) and whole.startswith(upto)):
        return None
    produced = upto[len(before) :]
    content = turn["content"].strip()
    extra = any(turn.get(key) for key in ("tool_calls", *THOUGHTS))
    if content not in produced if extra else not produced.lstrip().startswith(content):
        return None
    return len(before), _end(whole, len(before) + produced.find(content) + len(content), len(upto), specials)


def _end(text: str, start: int, stop: int, specials: tuple[str, ...]) -> int:
    """Where the end token of text[start:stop] ends: the first of the run of special tokens at its end. None: where
    the text does. `start` is after the turn's content, whose own last word may be a special token."""
    stop = start + len(text[start:stop].rstrip())
    end = stop
    while text.endswith(specials, start, stop):
        end = stop
        stop -= next(len(token) for token in specials if text.endswith(token, start, stop))
        stop = start + len(text[start:stop].rstrip())
    return end


def _by_generation(chat: Chat, renderer: Renderer, specials: tuple[str, ...]) -> Rendered | RowError:
    try:
        text, marked = renderer.render_marked(chat)
    except Exception as error:  # a template can raise anything
        return renderer.refusal(chat, error)
    blocks: list[tuple[int, int]] = []
    for start, stop in marked:  # a turn may be made of several blocks, one right after the other
        if blocks and blocks[-1][1] == start:
            start = blocks.pop()[0]
        blocks.append((start, stop))
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if len(blocks) != len(turns):
        return RowError(
            f"{renderer.origin} marks {len(blocks)} parts with {{% generation %}} for {len(turns)} assistant turns"
        )
    spans, trained = [], chat.trained()
    for turn, (start, stop) in zip(turns, blocks, strict=True):
        if turn in trained:
            content = chat.messages[turn]["content"].strip()
            at = text.find(content, start, stop)
            if at < 0:
                return RowError(f"the {{% generation %}} block of message {turn + 1} does not hold its content")
            spans.append((start, _end(text, at + len(content), stop, specials)))
    return Rendered(text=text, spans=spans, method="generation")


@dataclass(frozen=True, kw_only=True)
class _Skeleton:
    """A conversation of unique words: the template's text between them, whose turn each word is, and the spans."""

    pieces: list[str]
    turns: list[int]
    spans: list[tuple[int, int]]
    method: str

    def fit(self, chat: Chat, text: str) -> Rendered | None:
        """The spans carried over to a text that is this skeleton with other contents; None when it is not."""
        places = _place(self.pieces, self.turns, chat, text)
        if places is None:
            return None
        words = [len(_WORD.format(turn)) for turn in self.turns]
        starts = list(accumulate(map(sum, zip(map(len, self.pieces), words, strict=False)), initial=0))

        def carried(position: int) -> int:
            piece = bisect_right(starts, position) - 1
            return places[piece] + position - starts[piece]

        spans = [(carried(start), carried(stop)) for start, stop in self.spans]
        return Rendered(text=text, spans=spans, method=self.method)


def _words(chat: Chat) -> Chat:
    messages = [m | {"content": _WORD.format(i)} if m["content"] else m for i, m in enumerate(chat.messages)]
    return replace(chat, messages=messages)


def _skeleton(chat: Chat, renderer: Renderer, specials: tuple[str, ...]) -> _Skeleton | None:
    """None when the template refuses the words, or no way finds their spans."""
    words = _words(chat)
    [text] = renderer.render([words.messages], [words.tools])
    if isinstance(text, RowError):
        return None
    [found] = one_by_one([words], [text], renderer, specials)
    if isinstance(found, RowError):
        return None
    pieces = _WORDS.split(text)
    turns = [int(number) for number in pieces[1::2]]
    return _Skeleton(pieces=pieces[::2], turns=turns, spans=found.spans, method=found.method)


def _place(pieces: Sequence[str], turns: Sequence[int], chat: Chat, text: str) -> list[int] | None:
    """Where each piece of a skeleton begins in `text`; None when text is not the pieces with the contents between."""
    if not text.startswith(pieces[0]):
        return None
    at, places = len(pieces[0]), [0]
    for turn, after in zip(turns, pieces[1:], strict=True):
        content = chat.messages[turn]["content"] if turn < len(chat.messages) else ""
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        written = next((c for c in variants if text.startswith(c + after, at)), None)
        if written is None:
            return None
        places.append(at + len(written))
        at = places[-1] + len(after)
    return places if at == len(text) else None


def _by_sentinel(
    chat: Chat,
    text: str,
    renderer: Renderer,
    specials: tuple[str, ...],
    known: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> Rendered | RowError:
    """`known`: spans of turns that were found already. Only those can hold a thought or a call beside the content."""
    words = _words(chat)
    [skeleton] = renderer.render([words.messages], [words.tools])
    if isinstance(skeleton, str):
        pieces = _WORDS.split(skeleton)
        turns = [int(number) for number in pieces[1::2]]
        places = _place(pieces[::2], turns, chat, text)
        if places is not None:
            begins = [place + len(piece) for place, piece in zip(places, pieces[::2], strict=True)]
            ends = [_after(text, place, specials) for place in places[1:]]
            spans = {turn: known.get(turn, (begins[j], ends[j])) for j, turn in enumerate(turns)}
            if all(turn in spans for turn in chat.trained()):
                for turn in chat.trained():
                    for key in THOUGHTS if turn not in known else ():
                        if (thought := str(chat.messages[turn].get(key) or "").strip()) and thought in text:
                            return RowError(
                                f"the {key} of message {turn + 1} is in the text under {renderer.origin}, but not where can be "
                                f"told. Mark what the assistant writes with {{% generation %}} in a Jinja file named in "
                                f"data.chat_template"
                            )
                return Rendered(text=text, spans=[spans[turn] for turn in chat.trained()], method="sentinel")
    return RowError(
        f"cannot tell where the assistant's turns lie under {renderer.origin}: it changes earlier turns or their "
        f"contents. Mark them with {{% generation %}} in a Jinja file named in data.chat_template, or set "
        f"data.train_on: all"
    )


def _after(text: str, at: int, specials: tuple[str, ...]) -> int:
    """Past the special token that follows at `at`, white space between allowed; `at` itself when there is none."""
    token_at = at
    while text[token_at : token_at + 1].isspace():
        token_at += 1
    return next((token_at + len(token) for token in specials if text.startswith(token, token_at)), at)
