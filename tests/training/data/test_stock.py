"""Under the stock templates the mask is the assistant's text and its end token; one BOS; padding never in the loss."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast
from trebuchet.launcher.errors import DataError
from trebuchet.training.data.collate import IGNORE, collate

from .conftest import Prep
from .kit import chat, trained_texts
from .stock import STOCK, Stock

EVERY = pytest.mark.parametrize("name", STOCK)
ANSWERS = ["Four.", "An accent:\n  é, 漢字."]


def tokenizer_of(kind: Stock, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The test tokenizer with the family's special tokens; pad is EOS, and a tokenizer with BOS adds it by itself."""
    own = Tokenizer.from_str(backend.to_str())
    own.add_special_tokens(list(kind.specials))
    if kind.bos:
        own.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", special_tokens=[(kind.bos, own.token_to_id(kind.bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.eos)
    made.chat_template = kind.template
    return made


@EVERY
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_mask_is_the_answers_and_their_end(
    name: str, system: str | None, byte_level: Tokenizer, prep: Prep
) -> None:
    kind = STOCK[name]
    tokenizer = tokenizer_of(kind, byte_level)
    rows = [chat("What is 2+2?", ANSWERS[0], "And é?", ANSWERS[1], system=system), chat("Hi", "Yes.", system=system)]
    if system and not kind.system:
        with pytest.raises(DataError, match="System role not supported"):
            prep(rows, tokenizer)
        return
    prepared = prep(rows, tokenizer, packing=False)
    wanted = [kind.lead + answer + end for answer, end in zip(ANSWERS, kind.ends, strict=True)]
    assert trained_texts(prepared, tokenizer, 0) == wanted
    assert trained_texts(prepared, tokenizer, 1) == [kind.lead + "Yes." + kind.ends[1]]
    for i, row in enumerate(rows):
        ids = prepared.train.sample(i)[0].tolist()
        assert ids == tokenizer.apply_chat_template(row["messages"], return_dict=False)
        if kind.bos:
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id

    batch = collate([[prepared.train.sample(i)] for i in range(2)], pad_id=tokenizer.pad_token_id)
    end = tokenizer.convert_tokens_to_ids(kind.ends[1])
    assert (batch["labels"][1] == end).sum() == 1  # the end token is learnt once, though padding has the same id
    assert (batch["labels"][1, len(prepared.train.sample(1)[0]) - 1 :] == IGNORE).all()


@pytest.mark.parametrize("name", ["Qwen 3", "gpt-oss"])
def test_the_thought_before_the_last_answer_is_learnt_and_dropped_ones_are_not(
    name: str, byte_level: Tokenizer, prep: Prep
) -> None:
    kind, field = STOCK[name], {"Qwen 3": "reasoning_content", "gpt-oss": "thinking"}[name]
    tokenizer = tokenizer_of(kind, byte_level)
    row = chat("What is 2+2?", ANSWERS[0], "And é?", ANSWERS[1])
    row["messages"][1][field], row["messages"][3][field] = "early thought", "late thought"
    first, last = trained_texts(prep([row], tokenizer), tokenizer)
    assert first == ANSWERS[0] + kind.ends[0]
    assert last.endswith(ANSWERS[1] + kind.ends[1]) and last.count("late thought") == 1
    assert "early thought" not in tokenizer.decode(prep([row], tokenizer).train.sample(0)[0])


def test_a_thought_whose_place_cannot_be_told_is_refused(byte_level: Tokenizer, prep: Prep) -> None:
    """Rendered, but under a template that also changes the turns before: it would be left out of the loss without a word."""
    kind = STOCK["Phi-3"]
    tokenizer = tokenizer_of(kind, byte_level)
    tokenizer.chat_template = kind.template.replace("{{ m.content }}", "{{ m.thinking }}\n{{ m.content }}")
    row = chat("What is 2+2?", ANSWERS[0], "And é?", ANSWERS[1])
    row["messages"][1]["thinking"] = "early thought"
    with pytest.raises(DataError, match=r"the thinking of message 2 .* generation"):
        prep([row], tokenizer)


@pytest.mark.parametrize(
    ("roles", "flags", "wanted"),
    [
        ("assistant", {1: {"train": False}}, [ANSWERS[1]]),
        ("assistant", {3: {"weight": 0}}, [ANSWERS[0]]),
        ("assistant", {0: {"train": True}, 3: {"train": False}}, ["What is 2+2?", ANSWERS[0]]),
        (["user"], {}, ["What is 2+2?", "And é?"]),
        (["user", "assistant"], {1: {"train": False}}, ["What is 2+2?", "And é?", ANSWERS[1]]),
    ],
)
@pytest.mark.parametrize("name", ["ChatML", "Llama 3.1 and 3.3", "Qwen 3", "Gemma 3"])
def test_roles_and_single_turns_can_be_chosen(
    name: str, roles: Any, flags: dict[int, Any], wanted: list[str], byte_level: Tokenizer, prep: Prep
) -> None:
    kind = STOCK[name]
    tokenizer = tokenizer_of(kind, byte_level)
    row = chat("What is 2+2?", ANSWERS[0], "And é?", ANSWERS[1])
    for i, flag in flags.items():
        row["messages"][i] |= flag
    prepared = prep([row], tokenizer, train_on=roles)
    assert trained_texts(prepared, tokenizer) == [text + kind.ends[0] for text in wanted]
    assert "weight" not in tokenizer.decode(prepared.train.sample(0)[0])


def test_a_row_with_nothing_to_train_is_refused(byte_level: Tokenizer, prep: Prep) -> None:
    row = chat("Hi", "Yes.")
    row["messages"][1]["train"] = False
    with pytest.raises(DataError, match=r"line 1: no assistant turn that is to be trained"):
        prep([row], tokenizer_of(STOCK["ChatML"], byte_level))
    row["messages"][1]["train"] = "often"
    with pytest.raises(DataError, match=r"train of message 2 is 'often'; it must be true or false"):
        prep([row], tokenizer_of(STOCK["ChatML"], byte_level))
