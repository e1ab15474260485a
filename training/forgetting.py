"""What the tuned model has lost of its base: on general text, and on the base's own answers to prompts that are not the task.

Before training the base answers general prompts with fixed seeds, sampled at temperature 1 from its whole distribution; what it said
and how likely it was is kept. Afterwards the tuned model is asked how likely the same words are. Since the words are drawn from the
base, the mean of log p(base) - log p(tuned) per token is an unbiased estimate of KL(base || tuned), without keeping a distribution.
0 is the base itself; a quarter of a nat is noticeable, above one nat the model answers as another one would.

The prompts are in general.jsonl (written for this project) or a file of the user's with the same keys, prompt and answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..launcher.errors import DataError
from .scores import Subject, asking, score
from .verdict import ratio

SHIPPED = Path(__file__).with_name("general.jsonl")
ANSWER_TOKENS, SEED = 32, 1234
ADVICE = (
    "Lower the learning rate (by 3 to 10 times), train fewer epochs or stop early (evaluation.stop_after), mix general data into "
    "data.train (a tenth of the rows), or train adapters instead of all weights."
)


def read(path: str | None) -> list[tuple[str, str]]:
    """(prompt, answer) of each line. Raises DataError naming the line that has no such keys."""
    file = Path(path).expanduser() if path else SHIPPED
    if not file.exists():
        raise DataError(f"evaluation.general: {path} does not exist.")
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            out.append((str(row["prompt"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}:{number}: a general row is JSON with the keys prompt and answer.") from None
    return out


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """With the chat template where there is one."""
    if not tokenizer.chat_template:
        return list(map(int, tokenizer(prompt + "\n").input_ids))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(map(int, tokenizer(text, add_special_tokens=False).input_ids))


def ask_base(subject: Subject, tokenizer: Any, prompts: Sequence[str], pad_id: int) -> list[dict[str, list[int]]]:
    """The base's sampled answers, as token ids; the same on every rank that calls."""
    out = []
    with asking(subject), torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        for i, prompt in enumerate(prompts):
            torch.manual_seed(SEED + i)
            ids = prompt_ids(tokenizer, prompt)
            tensor = torch.tensor([ids], device=subject.device)
            said = subject.inside.generate(
                input_ids=tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=ANSWER_TOKENS, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, use_cache=True, pad_token_id=pad_id,
            )  # fmt: skip
            out.append({"prompt": ids, "answer": said[0, len(ids) :].tolist()})
    return out


def measure(
    subject: Subject,
    tokenizer: Any,
    said: Sequence[Mapping[str, list[int]]],
    general: Sequence[tuple[str, str]],
    pad_id: int,
) -> dict[str, Any]:
    """Loss rows of the base's answers and of the general answers under the model as it is; collective."""
    own = [sample(row["prompt"], row["answer"]) for row in said]
    texts = [sample(prompt_ids(tokenizer, p), tokenizer(a, add_special_tokens=False).input_ids) for p, a in general]
    out = {}
    for name, samples in (("own", own), ("general", texts)):
        rows = [[i] for i in range(len(samples))]
        out[name] = score(subject, samples.__getitem__, rows, micro_batch=4, pad_id=pad_id)["rows"]
    return out


def sample(prompt: Sequence[int], answer: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[len(prompt) :] = 1
    return ids, mask


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """`kl`: nats per token away from the base, with its interval; `general`: loss on general answers, with a verdict."""
    own = ratio(before["own"]["loss"], after["own"]["loss"], before["own"]["tokens"], lower_is_better=True)
    general = ratio(
        before["general"]["loss"], after["general"]["loss"], before["general"]["tokens"], lower_is_better=True
    )
    return {
        "kl_nats": own["difference"],
        "kl_low": own["low"],
        "kl_high": own["high"],
        "prompts": own["rows"],
        "general": general,
    }


def failure(found: Mapping[str, Any], limit: float) -> str | None:
    """The paragraph that fails a run, or None within the limit."""
    if found["kl_nats"] is None or found["kl_nats"] <= limit:
        return None
    return (
        f"the tuned model is {found['kl_nats']:.2f} nats a token away from its base on prompts that are not the task (95% between "
        f"{found['kl_low']:.2f} and {found['kl_high']:.2f}); evaluation.max_forgetting allows {limit:g}. {ADVICE}"
    )
