"""What refuses a data set before a model is loaded, also when it comes out of the cache."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from trebuchet.launcher.errors import DataError

from . import kit
from .conftest import Prep
from .kit import chat, chats, trained_texts, wrap

ALL_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
# The end token stands outside the block, so it is never trained: easy to do in marks of one's own.
END_OUTSIDE = kit.GENERATION.replace(
    "{{ m.content }}<|im_end|>\n{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>\n"
)
DOUBLE_BOS = "{{ bos_token }}{{ bos_token }}" + kit.CHATML


@pytest.mark.parametrize(
    "template, says",
    [
        (ALL_MARKED, r"5 of 5 samples \(the first: line 1\): every token carries loss .*data\.train_on: all"),
        (END_OUTSIDE, "no end token closes the assistant's part .*must write <|im_end|>"),
        (kit.DROPS_LAST_END, "no end token closes the assistant's part"),
        (DOUBLE_BOS, r"they begin with <\|bos\|> twice\. Take it out of the template"),
    ],
)
def test_masks_that_would_train_the_wrong_thing(template: str, says: str, byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(byte_level, template)
    for _ in range(2):  # from the files, and from the record of the cache
        with pytest.raises(DataError, match=says) as caught:
            prep(chats(5), tokenizer)
        assert "\n" not in str(caught.value)


def test_answers_of_which_no_token_is_left(byte_level: Tokenizer, prep: Prep) -> None:
    deaf = Tokenizer.from_str(byte_level.to_str())
    deaf.normalizer = normalizers.Replace("ø", "")
    tokenizer = wrap(
        deaf, "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"1 of 2 samples \(the first: line 2\): no token of theirs carries loss"):
        prep([chat("a", "b"), chat("a", "ø")], tokenizer)


def test_the_same_template_passes_when_all_tokens_are_asked_for(byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(byte_level, ALL_MARKED)
    assert trained_texts(prep(chats(5), tokenizer, train_on="all"), tokenizer)[0].endswith("<|im_end|>")


def test_one_sample_without_an_end_is_enough(byte_level: Tokenizer, prep: Prep) -> None:
    template = kit.CHATML.replace("<|im_end|>", "{% if 'cut' not in m.content %}<|im_end|>{% endif %}")
    with pytest.raises(DataError, match=r"1 of 4 samples \(the first: line 3\): no end token"):
        prep([*chats(2), chat("a", "cut off"), *chats(1)], wrap(byte_level, template))


def test_bos_in_a_text_and_from_the_tokenizer(metaspace: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(metaspace, None, eos="<|eos|>")
    with pytest.raises(
        DataError,
        match=r"1 of 2 samples \(the first: line 2\): they begin with <\|bos\|> twice\. Take it out of the text",
    ):
        prep([{"text": "fine"}, {"text": "<|bos|>twice"}], tokenizer)


def test_truncation_says_share_limit_and_the_length_that_would_do(chatml: Any, prep: Prep) -> None:
    rows = [chat("Count", " ".join(["one"] * (1 + i))) for i in range(100)]
    longest = sorted(prep(rows, chatml).train.lengths)
    limit, enough = int(longest[79]), int(longest[94])
    with pytest.raises(
        DataError,
        match=rf"20\.0% of the samples .* allows 5\.0%\. Set data\.max_length: {enough} .*max_truncated: 0\.2\.",
    ):
        prep(rows, chatml, max_length=limit)
    assert prep(rows, chatml, max_length=enough).report.train.truncated == 5  # exactly the share that is allowed
    with pytest.raises(DataError, match=rf"{enough} would do, but the model has {enough - 1} positions"):
        prep(rows, chatml, max_length=limit, positions=enough - 1)
    report = prep(rows, chatml, max_length=limit, max_truncated=0.2).report.train
    assert (report.truncated, report.samples, report.lengths["max"]) == (20, 100, limit)


def test_a_prompt_that_fills_the_row_is_dropped_and_counted(chatml: Any, prep: Prep) -> None:
    rows = [*chats(9), chat("long " * 100, "Answer.")]
    report = prep(rows, chatml, max_length=64, max_truncated=0.5).report.train
    assert (report.samples, report.truncated, report.no_loss_left) == (9, 1, 1)
    with pytest.raises(DataError, match=r"the prompts alone fill data\.max_length 64 in all 1 samples"):
        prep(rows[9:], chatml, max_length=64, max_truncated=1)


def test_max_length_beyond_the_positions_of_the_model(chatml: Any, prep: Prep) -> None:
    with pytest.raises(
        DataError, match=r"data\.max_length 2048 is more than the 1024 positions of tiny; set data\.max_length: 1024"
    ):
        prep(chats(2), chatml, positions=1024)


def test_conversations_for_a_base_model_say_what_to_set(base: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=r"tiny has no chat template, .* Set data\.chat_template: .* alpaca"):
        prep(chats(2), base)


@pytest.mark.parametrize(
    "choice, says",
    [
        ("chatlm", "neither a file nor the name of a template; did you mean 'chatml'"),
        ("templates/x.jinja", "neither a file"),
    ],
)
def test_a_template_that_is_not_there(choice: str, says: str, chatml: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=says):
        prep(chats(2), chatml, chat_template=choice)


def test_chatml_for_a_tokenizer_without_its_tokens(prep: Prep) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<|eos|>": 1, "<|bos|>": 2, "<|pad|>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"chatml writes <\|im_start\|>, which is no token of tiny"):
        prep(chats(2), wrap(backend, None, eos="<|eos|>"), chat_template="chatml")


def test_a_tokenizer_without_eos(byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(byte_level, kit.CHATML)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="tiny: has no EOS token"):
        prep(chats(2), tokenizer)


def test_a_jinja_file_is_used_and_its_mistake_named_by_line(base: Any, prep: Prep, tmp_path: Any) -> None:
    file = tmp_path / "my.jinja"
    file.write_text(kit.CHATML)
    assert trained_texts(prep(chats(1), base, chat_template=str(file)), base) == ["Answer 0.<|im_end|>"]
    file.write_text(kit.CHATML + "\n{% if %}")
    with pytest.raises(DataError, match=r"my\.jinja, line 5: not a Jinja template"):
        prep(chats(1), base, chat_template=str(file))
