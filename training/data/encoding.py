"""Samples into token ids and a loss mask, in batches, and what is wrong with a mask found row by row.

mask[t] says that token t carries loss as a *target*; the first token of a sample never does, because nothing stands
before it. Text is tokenized whole, once; spans become tokens by overlap, so a token that holds the last of the
header's white space and the first of the answer is trained. Left out: lengths. Nothing is cut here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...launcher.errors import DataError
from .preferences import Anything, Judged
from .readers import RowError
from .rendering import Renderer
from .spans import Rendered, SpanFinder
from .turns import Chat, Example, Plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """ids int32 [T], mask uint8 [T]; `method` is how the spans were found; `ends`: every trained part closes with an
    end token."""

    ids: np.ndarray
    mask: np.ndarray
    method: str
    ends: bool


class Encoder:
    """A tokenizer ready for batches: its own copy of the Rust tokenizer, without truncation or padding left over in
    the file."""

    def __init__(
        self, tokenizer: Any, tokenizer_id: str, renderer: Renderer | None, *, train_on: str | tuple[str, ...]
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{tokenizer_id}: has no fast tokenizer (tokenizer.json), which the loss mask needs for its offsets."
            )
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{tokenizer_id}: has no EOS token, so a tuned model would never stop; set eos_token in its "
                f"tokenizer_config.json."
            )
        self.name, self.renderer, self.train_on = tokenizer_id, renderer, train_on
        self._tokenizer = tokenizer
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self.special_ids = frozenset(special)
        self.specials = tuple(sorted(filter(None, special.values()), key=len, reverse=True))
        self._finder = SpanFinder(renderer, self.specials) if renderer else None

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """One result per example, in order."""
        results: dict[int, Encoded | RowError] = {}
        chats = {i: e for i, e in enumerate(examples) if isinstance(e, Chat)}
        plain = {i: e for i, e in enumerate(examples) if isinstance(e, Plain)}
        results |= zip(chats, self._chats(list(chats.values())), strict=True)
        results |= zip(plain, self._plain(list(plain.values())), strict=True)
        return [results[i] for i in range(len(examples))]

    def check_agreement(self, example: Example, encoded: Encoded) -> None:
        """Our batched way gives the ids that the tokenizer's own front door gives; called once a source."""
        if isinstance(example, Plain):
            ids = self._tokenizer(example.prompt + example.completion, verbose=False)["input_ids"]
            same = encoded.ids[: len(ids)].tolist() == ids
        else:
            assert self.renderer is not None  # or there would be no encoded chat
            ids = self._tokenizer.apply_chat_template(
                example.messages, tools=example.tools, chat_template=self.renderer.template, return_dict=False
            )
            same = encoded.ids.tolist() == ids
        if not same:
            raise DataError(
                f"{self.name}: its tokenizer gives other ids when it is called than its tokenizer.json does, so it "
                f"changes the text on the way, and a loss mask by characters cannot be right. Use a tokenizer "
                f"without such a step."
            )

    def _plain(self, examples: Sequence[Plain]) -> list[Encoded | RowError]:
        """Prompt and completion as one text, EOS after it. The completion begins at the first token that the prompt
        alone does not have there (TRL's common prefix): `def f` + `oo():` gives `def| foo|():`, and ` foo` is
        trained."""
        wholes = self._fast([e.prompt + e.completion for e in examples])
        prompts = (
            self._fast([e.prompt for e in examples])
            if any(e.prompt for e in examples)
            else [np.empty(0, np.int32)] * len(examples)
        )
        out: list[Encoded | RowError] = []
        for example, whole, prompt in zip(examples, wholes, prompts, strict=True):
            ids = whole if len(whole) and whole[-1] == self.eos else np.append(whole, np.int32(self.eos))
            mask = np.ones(len(ids), np.uint8)
            if example.prompt and self.train_on != "all":
                mask[: _common_prefix(ids, prompt)] = 0
            mask[0] = 0
            out.append(Encoded(ids=ids, mask=mask, method="whole" if not example.prompt else "prefix", ends=True))
        return out

    def _chats(self, chats: Sequence[Chat]) -> list[Encoded | RowError]:
        if not chats:
            return []
        if self.renderer is None or self._finder is None:
            raise DataError(
                f"{self.name} has no chat template, and the data are conversations. Set data.chat_template: a Jinja "
                f"file, or by name alpaca (any tokenizer) or chatml (one that has its tokens); or give prompt and "
                f"completion as text."
            )
        if self.train_on == "all":
            texts = self.renderer.render([c.messages for c in chats], [c.tools for c in chats])
            found = [
                t if isinstance(t, RowError) else Rendered(text=t, spans=[(0, len(t))], method="whole") for t in texts
            ]
        else:
            found = self._finder.find(chats)
        good = [(chat, f) for chat, f in zip(chats, found, strict=True) if isinstance(f, Rendered)]
        encodings = self._backend.encode_batch([f.text for _, f in good], add_special_tokens=False)
        results = iter(self._masked(good, encodings))
        return [f if isinstance(f, RowError) else next(results) for f in found]

    def _masked(self, rendered: Sequence[tuple[Chat, Rendered]], encodings: Sequence[Any]) -> list[Encoded | RowError]:
        """Masks from spans, each span decoded back and compared with the content that it must hold."""
        encoded, pieces, owners = [], [], []
        for i, ((chat, found), encoding) in enumerate(zip(rendered, encodings, strict=True)):
            ids = np.array(encoding.ids, dtype=np.int32)
            mask = np.zeros(len(ids), np.uint8)
            ends = True
            contents = [""] if found.method == "whole" else [chat.messages[k]["content"] for k in chat.trained()]
            for (start, stop), content in zip(found.spans, contents, strict=True):
                first, last = _tokens(encoding, start, stop)
                mask[first : last + 1] = 1
                ends &= self._ends(ids[first : last + 1])
                if found.method != "whole":
                    pieces.append(ids[first : last + 1].tolist())
                    owners.append((i, content))
            mask[:1] = 0
            encoded.append(Encoded(ids=ids, mask=mask, method=found.method, ends=ends))
        out: list[Encoded | RowError] = list(encoded)
        decoded = self._backend.decode_batch(pieces, skip_special_tokens=False) if pieces else []
        for text, (i, content) in zip(decoded, owners, strict=True):
            if content.strip() not in text and not self._same(content, text):
                out[i] = RowError(
                    f"the trained tokens decode to {_short(text)}, not to the assistant's {_short(content)}"
                )
        return out

    def _same(self, content: str, text: str) -> bool:
        """For tokenizers that change text (Unicode forms, spaces): compare with what the content itself decodes
        to."""
        alone = self._backend.decode(
            self._backend.encode(content, add_special_tokens=False).ids, skip_special_tokens=False
        )
        return "".join(alone.split()) in "".join(text.split())

    def _ends(self, ids: np.ndarray) -> bool:
        """The last token is a special one, white space after it left out of account (train_on: all keeps it)."""
        tail = ids[-8:].tolist()
        while tail and tail[-1] not in self.special_ids and not self._backend.decode([tail[-1]]).strip():
            tail.pop()
        return bool(tail) and tail[-1] in self.special_ids

    def _fast(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(e.ids, dtype=np.int32)
            for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=True)
        ]


def joined(sides: Sequence[Encoded], example: Anything) -> dict[str, Any]:
    """What the store keeps of a row: one sample, or two, one behind the other.

    Both answers of a pair begin at the same token, the first that either does not share with the prompt (as in TRL): else
    one of them would be compared on a token that belongs to the other's prompt.
    """
    label = int(example.label) if isinstance(example, Judged) else -1
    if len(sides) == 1:
        return {"ids": sides[0].ids, "mask": sides[0].mask, "label": label}
    if all(side.method == "prefix" for side in sides):
        first = min(int(side.mask.argmax()) for side in sides)
        for side in sides:
            side.mask[max(first, 1) :] = 1
    ids, mask = (np.concatenate(column) for column in ([s.ids for s in sides], [s.mask for s in sides]))
    return {"ids": ids, "mask": mask, "split": len(sides[0].ids), "label": label}


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _tokens(encoding: Any, start: int, stop: int) -> tuple[int, int]:
    """First and last token that overlap the characters start..stop-1. Characters that no token holds are skipped."""
    first = next((t for c in range(start, stop) if (t := encoding.char_to_token(c)) is not None), 0)
    last = next((t for c in range(stop - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), first - 1)
    return first, last


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:40] + " … " + text[-15:])
