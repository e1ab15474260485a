"""What refuses a data set before any model is loaded: masks, end tokens, BOS, lengths, emptiness.

The faults of single samples are counted while they are tokenized (`note_faults`) and stored with them, so that a
cache hit refuses exactly what the first run refused. Left out: rows that cannot be read or rendered; those never
reach a store.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...launcher.errors import DataError
from .encoding import Encoded, Encoder
from .store import Store
from .turns import Chat, Example

Faults = dict[str, list[int]]  # kind -> [how many samples, row of the first]


def note_faults(faults: Faults, row: int, example: Example, encoded: Encoded, encoder: Encoder) -> None:
    """Adds what is wrong with one sample to `faults`."""
    ids, trained = encoded.ids, int(encoded.mask.sum())
    if trained == 0:
        _count(faults, "nothing_trained", row)
    elif isinstance(example, Chat) and encoder.train_on != "all" and trained >= len(ids) - 1:
        _count(faults, "all_trained", row)
    if not encoded.ends:
        _count(faults, "no_end", row)
    if encoder.bos is not None and len(ids) > 1 and ids[0] == ids[1] == encoder.bos:
        _count(faults, "double_bos", row)


def _count(faults: Faults, kind: str, row: int) -> None:
    faults.setdefault(kind, [0, row])[0] += 1


def check_store(store: Store, name: str, unit: str, template: str | None, tokenizer: Any) -> None:
    """Raises DataError for the first kind of fault in the store's record."""
    total, faults = store.meta["samples"], store.meta["faults"]
    origin = template or "the text"
    eos = tokenizer.eos_token
    sentences = {
        "nothing_trained": f"no token of theirs carries loss under {origin}: the tokenizer drops the answers.",
        "all_trained": f"every token carries loss under {origin}, the prompt too. Let it mark the assistant's part "
        f"alone, or ask for this with data.train_on: all.",
        "no_end": f"no end token closes the assistant's part under {origin}, so the model would never learn to stop. "
        f"The template must write {eos} (eos_token) or another special token after every assistant turn, inside the "
        f"{{% generation %}} block if it has one.",
        "double_bos": f"they begin with {tokenizer.bos_token} twice. "
        + ("Take it out of the template." if template else "Take it out of the text: the tokenizer adds its own."),
    }
    for kind, sentence in sentences.items():
        if kind in faults:
            count, row = faults[kind]
            raise DataError(f"{name}: {count:,} of {total:,} samples (the first: {unit} {row}): {sentence}")


def check_empty(count: int, what: str, why: str) -> None:
    if count == 0:
        raise DataError(f"{what} is empty{why}.")


def check_truncation(
    lengths: np.ndarray, *, what: str, max_length: int, limit: float, model_max_length: int | None
) -> None:
    """`lengths` before the cut. Says which max_length would do."""
    share = float((lengths > max_length).mean())
    if share <= limit:
        return
    enough = int(np.sort(lengths)[max(0, int(np.ceil(round((1 - limit) * len(lengths), 6))) - 1)])
    accept = min(1.0, np.ceil(share * 100) / 100)
    if model_max_length is None or enough <= model_max_length:
        advice = f"Set data.max_length: {enough} (the longest sample has {int(lengths.max())})"
    else:
        advice = f"{enough} would do, but the model has {model_max_length} positions: split the long rows"
    raise DataError(
        f"{what}: {share:.1%} of the samples are longer than data.max_length {max_length} and would lose their end; "
        f"data.max_truncated allows {limit:.1%}. {advice}, or accept it with data.max_truncated: {accept:g}."
    )


def check_positions(max_length: int, model_max_length: int | None, tokenizer_id: str) -> None:
    if model_max_length is not None and max_length > model_max_length:
        raise DataError(
            f"data.max_length {max_length} is more than the {model_max_length} positions of {tokenizer_id}; "
            f"set data.max_length: {model_max_length} or less."
        )
