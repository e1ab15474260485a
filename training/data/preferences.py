"""Rows of the two layouts that compare answers: pairs of a chosen and a rejected one, and single ones with a label.

    preference    chosen, rejected, optionally prompt: text, or messages; without a prompt it is what both begin with
    kto           prompt, completion, label; or messages (or conversations) and kto_tag: true, false, 0 or 1; or a pair
                  without a label, which is read as two answers: the chosen with label true, the rejected with false

Prompt and answer become the same two kinds of sample as everywhere (`layouts.py`), so templates, masks and end tokens
are those of `objective: sft`. Left out: margins, and more than two answers to a prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...launcher.errors import DataError
from . import layouts, turns
from .readers import RowError
from .turns import Chat, Example, Plain

REQUIRED = {"preference": ("chosen", "rejected"), "kto": ()}
LABELS = ("label", "kto_tag")
OURS = ("chosen", "rejected", "prompt", *LABELS)
_WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example

    def keys(self) -> tuple[int, int]:
        """64-bit hashes of the prompt and of the whole pair."""
        prompt, first = self.chosen.keys()
        return prompt, turns.number_of(first, self.rejected.keys()[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One answer and whether it is wanted."""

    example: Example
    label: bool

    def keys(self) -> tuple[int, int]:
        prompt, whole = self.example.keys()
        return prompt, turns.number_of(whole, self.label)


def recognise(columns: Collection[str], wanted: str, kind: str, source: str) -> str:
    """`kind` is preference or kto. The layout's name; for labelled answers `kto/` and the layout of the answer, which is
    recognised as for sft. Raises DataError when the columns do not hold what the objective reads."""
    found = ", ".join(sorted(columns)) or "none"
    paired = all(name in columns for name in REQUIRED["preference"]) and not any(name in columns for name in LABELS)
    if kind == "kto" and (wanted == "preference" or (wanted == "auto" and paired)):
        kind = "preference"  # `unpaired` makes two of each
    if wanted not in ("auto", kind):
        raise DataError(f"{source}: format {wanted} has no {kind} rows, which the objective reads; found: {found}.")
    if kind == "preference":
        if missing := [name for name in REQUIRED["preference"] if name not in columns]:
            raise DataError(
                f"{source}: a preference pair needs the column {missing[0]}, found: {found}. Name the file's own column "
                f"for it with columns: {{{missing[0]}: NAME}}."
            )
        return "preference"
    if not any(name in columns for name in LABELS):
        raise DataError(
            f"{source}: kto needs the column label (or kto_tag), found: {found}. Name the file's own column for it with "
            f"columns: {{label: NAME}}."
        )
    inner = layouts.recognise([c for c in columns if c not in LABELS], "auto", kind="sft", source=source)
    return f"kto/{inner}"


def convert(row: Mapping[str, Any], layout: str) -> Pair | Judged:
    """One row, columns renamed already. Raises RowError."""
    if layout == "preference":
        return _pair(row)
    inner = layouts.convert(row, layout.removeprefix("kto/"))
    _check_prompt(inner)
    return Judged(example=inner, label=_label(row))


def unpaired(row: Mapping[str, Any], pair: Pair) -> list[tuple[dict[str, Any], Judged]]:
    """The two labelled answers of a pair, each with a row that would be read as it. Raises RowError."""
    rest = {name: value for name, value in row.items() if name not in (*REQUIRED["preference"], "prompt")}
    out = []
    for side, label in ((pair.chosen, True), (pair.rejected, False)):
        if isinstance(side, Plain):
            _check_prompt(side)
            both: tuple[Any, Any] = side.prompt, side.completion
        else:
            both = side.messages[: side.first_trained], side.messages[side.first_trained :]
        own = {"prompt": both[0], "completion": both[1], "label": label}
        out.append((rest | own, Judged(example=side, label=label)))
    return out


def _check_prompt(answer: Example) -> None:
    if isinstance(answer, Plain) and not answer.prompt:
        raise RowError("prompt is empty; kto compares answers to other prompts")


def _label(row: Mapping[str, Any]) -> bool:
    name = next((name for name in LABELS if name in row), LABELS[0])
    value = row.get(name)
    label = _WORDS.get(str(value).strip().lower())
    if label is None:
        raise RowError(f"column {name} is {'missing' if value is None else repr(value)}; it must be true or false")
    return label


def _pair(row: Mapping[str, Any]) -> Pair:
    for name in REQUIRED["preference"]:
        if row.get(name) is None:
            raise RowError(f"column {name} is missing" if name not in row else f"column {name} is null")
    chosen, rejected, prompt = (_side(row.get(name), name) for name in ("chosen", "rejected", "prompt"))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal, so there is nothing to prefer")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        if not chosen.strip() or not rejected.strip():
            raise RowError(f"{'chosen' if not chosen.strip() else 'rejected'} is empty")
        return Pair(chosen=Plain(prompt=prompt, completion=chosen), rejected=Plain(prompt=prompt, completion=rejected))
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in (chosen, rejected)]
    if not all(isinstance(side, list) for side in (*sides, before or [])):
        raise RowError("prompt, chosen and rejected must be text or lists of messages")
    # Some collections repeat the prompt as a column beside whole conversations; what both sides begin with is the prompt then.
    if before is None or all(side and side[0].get("role") in ("system", "user") for side in sides):
        before, sides = _common_turns(*sides)
    tools = row.get("tools")
    both = [turns.chat([*before, *side], first_trained=len(before), tools=tools) for side in sides]
    return Pair(chosen=both[0], rejected=both[1])


def _side(value: Any, column: str) -> Any:
    """Text, or a list of messages: also one message alone, ShareGPT's from and value, and JSON text out of a CSV."""
    value = turns.decoded(value)
    if isinstance(value, Mapping):
        value = [dict(value)]
    if isinstance(value, list):
        return [turns.speaker(turn, i, column) for i, turn in enumerate(value, start=1)]
    return value


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(what both begin with, the two rests). A space before the first difference goes to the answers, as TRL has it:
    tokenizers join it to the word behind."""
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if n and chosen[n - 1] == " ":
        n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def _common_turns(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    if n == 0:
        raise RowError("chosen and rejected begin with different turns, so there is no common prompt")
    return chosen[:n], [chosen[n:], rejected[n:]]


Anything = Chat | Plain | Pair | Judged


def parts(example: Anything) -> tuple[Example, ...]:
    """The samples that a row holds: chosen and rejected, or the one."""
    if isinstance(example, Pair):
        return example.chosen, example.rejected
    return (example.example,) if isinstance(example, Judged) else (example,)
