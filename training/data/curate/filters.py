"""What is wrong with one sample by itself: length, repetition, refusals, damaged characters, language.

Each check returns a reason or None; the reason's words are what the record counts. Left out: the user's own rules (`rules.py`) and
everything that compares rows (`duplicates.py`, `leaks.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ....launcher.errors import UserError
from ....launcher.schema_curate import Curate

_HEAD = 400  # characters that the language is told from: py3langid's time grows with the text (seen: 900 characters, 1.1 ms)
_OPENING = 250  # characters of an answer in which a refusal is looked for

# Openings that aligned models decline with, as published for filtering (ShareGPT cleaning lists, 2023) and seen since.
_REFUSAL = re.compile(
    r"\b(?:"
    r"i(?:'|’)?m sorry,? but i (?:can|am|do|don)"
    r"|i(?:'|’)?m (?:really )?sorry,? (?:but )?i (?:can(?:'|’)?t|cannot|am unable|won(?:'|’)?t)"
    r"|i (?:apologi[sz]e|am sorry),? but i (?:can(?:'|’)?t|cannot|am (?:not able|unable))"
    r"|as an ai(?: language)? model"
    r"|as an? (?:artificial intelligence|large language model)"
    r"|i(?:'|’)?m (?:just )?an ai(?: language model| assistant)?[,.] (?:and |so )?i (?:can(?:'|’)?t|cannot|do not|don(?:'|’)?t)"
    r"|i (?:can(?:'|’)?t|cannot|am unable to|am not able to|won(?:'|’)?t) "
    r"(?:assist|help you with|fulfil+|comply|provide (?:that|this|any)|create|engage|generate|discuss|answer that)"
    r")",
    re.IGNORECASE,
)
# U+FFFD stands where a decoder gave up; C0 and C1 controls other than tab and line ends are bytes that were never text.
_CONTROL = bytes(sorted({*range(32), 127} - set(b"\t\n\f\r")))
_BEYOND = re.compile("[\ufffd\x80-\x9f]")

Check = Callable[[str, str, int, float], str | None]


def checks(curate: Curate) -> list[Check]:
    """The checks that the configuration asks for, cheapest first; each takes (prompt, answer, the answer's number of words, its
    repetition)."""
    found: list[Check] = []
    if curate.min_words or curate.max_words is not None:
        found.append(_length(curate.min_words, curate.max_words))
    if curate.refusals:
        found.append(lambda prompt, answer, *_: "refusal" if _REFUSAL.search(answer[:_OPENING]) else None)
    if curate.max_repetition is not None:
        limit = curate.max_repetition
        found.append(lambda prompt, answer, count, repeated: "repetition" if repeated > limit else None)
    if curate.damaged:
        found.append(_damaged)
    if curate.languages:
        found.append(_language(frozenset(curate.languages)))
    return found


def _length(least: int, most: int | None) -> Check:
    def check(prompt: str, answer: str, count: int, repeated: float) -> str | None:
        return "too short" if count < least else "too long" if most is not None and count > most else None

    return check


def _damaged(prompt: str, answer: str, count: int, repeated: float) -> str | None:
    for text in (prompt, answer):
        ascii_only, raw = text.isascii(), text.encode("utf-8")
        if len(raw.translate(None, _CONTROL)) != len(raw):
            return "damaged characters"
        if not ascii_only and (_BEYOND.search(text) or _bad()(text)):
            return "damaged characters"
    return None


@lru_cache(maxsize=1)
def _bad() -> Callable[[str], bool]:
    """ftfy's judgement of mojibake: character sequences that only a wrong decoder writes."""
    try:
        from ftfy.badness import is_bad
    except ImportError:
        raise UserError(
            "data.curate.damaged needs ftfy: pip install 'trebuchet[curate]', or switch it off: data.curate.damaged: false."
        ) from None
    return is_bad


def _language(wanted: frozenset[str]) -> Check:
    classify = _classifier()
    if unknown := sorted(wanted - frozenset(classify.nb_classes)):
        raise UserError(
            f"data.curate.languages: {unknown[0]} is not a code that py3langid knows (ISO 639-1, as en or de)."
        )

    def check(prompt: str, answer: str, count: int, repeated: float) -> str | None:
        found = classify.classify(f"{prompt[: _HEAD // 2]} {answer[:_HEAD]}"[:_HEAD])[0]
        return None if found in wanted else f"language {found}"

    return check


@lru_cache(maxsize=1)
def _classifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "data.curate.languages needs py3langid: pip install 'trebuchet[curate]', or leave languages out."
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)
