"""For tests that train in this process: the loop of the tiny run, and its loss by plain transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from trebuchet.training.loop import Loop
    from trebuchet.training.session import Session

Sample = tuple["torch.Tensor", int, int]


@pytest.fixture
def make_loop(session: Callable[..., Session]) -> Callable[..., Loop]:
    """The loop of a session, its model prepared and no step made."""

    def build(changes: Mapping[str, Any] | None = None, **top: Any) -> Loop:
        made = session(changes, **top)
        return made.loop(made.prepared())

    return build


@pytest.fixture(scope="session")
def by_template(tiny_model: Path) -> Callable[[Path], list[Sample]]:
    """(ids [1, T], first trained position, end) of each conversation of a file: the answer with its end token."""

    def read(rows: Path) -> list[Sample]:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
        out = []
        for line in rows.read_text().splitlines():
            messages = json.loads(line)["messages"]
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
            prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            first = len(tokenizer(prompt).input_ids)
            out.append((ids, first, ids[0].tolist().index(tokenizer.eos_token_id, first) + 1))
        return out

    return read


@pytest.fixture(scope="session")
def reference_loss() -> Callable[[Any, list[Sample]], torch.Tensor]:
    """Mean over all trained tokens, each conversation by itself: no packing, no padding, nothing of ours."""

    def mean(model: Any, samples: list[Sample]) -> torch.Tensor:
        total: Any = 0.0
        for ids, first, end in samples:
            logp = model(ids).logits[0, first - 1 : end - 1].log_softmax(-1)
            total = total - logp.gather(1, ids[0, first:end, None]).sum()
        return total / sum(end - first for _, first, end in samples)

    return mean
