"""The loss mask covers the assistant's text and its end token, and nothing else, under templates of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from trebuchet.launcher.errors import DataError
from trebuchet.training.data.encoding import Encoder
from trebuchet.training.data.readers import RowError
from trebuchet.training.data.rendering import find_template
from trebuchet.training.data.spans import SpanFinder, one_by_one
from trebuchet.training.data.turns import Chat

from . import kit
from .conftest import Prep
from .kit import chat, trained_texts, wrap

TALK = chat("What is 2+2?", "Four.", "And é?", "An accent:\n  é, 漢字.", system="Be brief.")

# template, its end token, how the spans are found in a talk of two rounds
KINDS = {
    "chatml": (kit.CHATML, "<|im_end|>", "incremental"),
    "llama3": (kit.LLAMA3, "<|eot_id|>", "incremental"),
    "generation": (kit.GENERATION, "<|im_end|>", "generation"),
    "two blocks": (kit.TWO_BLOCKS, "<|end|>", "generation"),
    "phi3": (kit.PHI3, "<|end|>", "sentinel"),
    "thinking": (kit.THINK, "<|im_end|>", "sentinel"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_mask_is_every_answer_and_its_end_token(name: str, byte_level: Tokenizer, prep: Prep) -> None:
    template, end, method = KINDS[name]
    tokenizer = wrap(byte_level, template, eos=end)
    prepared = prep([TALK], tokenizer)
    assert trained_texts(prepared, tokenizer) == ["Four." + end, "An accent:\n  é, 漢字." + end]
    assert prepared.report.sources[0].spans == {method: 1}
    ids = tokenizer.apply_chat_template(TALK["messages"], return_dict=False)
    assert prepared.train.sample(0)[0].tolist() == ids


@pytest.mark.parametrize("name", KINDS)
def test_one_round_is_masked_like_several(name: str, byte_level: Tokenizer, prep: Prep) -> None:
    template, end, _ = KINDS[name]
    tokenizer = wrap(byte_level, template, eos=end)
    assert trained_texts(prep([chat("Hello", "Hi there.")], tokenizer), tokenizer) == ["Hi there." + end]


def test_what_the_generation_prompt_leaves_out_has_to_be_learnt(byte_level: Tokenizer, prep: Prep) -> None:
    """Zephyr's prompt ends before the newline of the header, so the model must write that newline itself."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    tokenizer = wrap(byte_level, template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    assert trained_texts(prep([TALK], tokenizer), tokenizer)[0] == "\nFour.<|end|>"


def test_ids_and_mask_equal_those_put_together_from_pieces(chatml: Any, prep: Prep) -> None:
    """ChatML can be tokenized piece by piece, since special tokens part the text: a reference that needs no offsets."""
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    pieces = [(asked, 0)]
    pieces += [("Four.<|im_end|>", 1), ("\n<|im_start|>user\nAnd é?<|im_end|>\n<|im_start|>assistant\n", 0)]
    pieces += [("An accent:\n  é, 漢字.<|im_end|>", 1), ("\n", 0)]
    ids, mask = prep([TALK], chatml).train.sample(0)
    expected = [(token, on) for text, on in pieces for token in chatml(text, add_special_tokens=False)["input_ids"]]
    assert list(zip(ids.tolist(), mask.tolist(), strict=True)) == expected


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=30).filter(str.strip)


@pytest.mark.parametrize("name", KINDS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(turns=st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_any_text_is_masked_exactly_or_refused(name: str, byte_level: Tokenizer, turns: list[str]) -> None:
    """Decoded, each run of trained tokens is the answer and its end, but for white space shared with the header."""
    template, end, _ = KINDS[name]
    tokenizer = wrap(byte_level, template, eos=end)
    encoder = Encoder(tokenizer, "tiny", find_template(None, tokenizer, "tiny"), train_on="assistant")
    messages = chat(*turns)["messages"]
    [found] = encoder.encode([Chat(messages=messages)])
    assert not isinstance(found, RowError), found
    cuts = np.flatnonzero(np.diff(found.mask)) + 1
    runs = zip(np.split(found.ids, cuts), np.split(found.mask, cuts), strict=True)
    trained = [str(tokenizer.decode(ids.tolist())) for ids, mask in runs if mask[0]]
    assert [text.removesuffix(end).strip() for text in trained] == [answer.strip() for answer in turns[1::2]]
    assert all(text.endswith(end) for text in trained) and found.ends


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), system=st.none() | words
)
def test_spans_carried_over_from_a_skeleton_are_those_of_the_row_itself(
    name: str, byte_level: Tokenizer, turns: list[str], system: str | None
) -> None:
    tokenizer = wrap(byte_level, KINDS[name][0])
    renderer = find_template(None, tokenizer, "tiny")
    assert renderer is not None
    specials = tuple(sorted(tokenizer.all_special_tokens + kit.SPECIAL, key=len, reverse=True))
    talk = Chat(messages=chat(*turns, system=system)["messages"])
    [found] = SpanFinder(renderer, specials).find([talk])
    if not renderer.marks:
        [text] = renderer.render([talk.messages], [None])
        assert [found] == one_by_one([talk], [str(text)], renderer, specials)


def test_an_end_token_inside_an_answer_does_not_end_it(chatml: Any, prep: Prep) -> None:
    prepared = prep([chat("Which token ends a turn?", "It is <|im_end|> here.", "So?", "Yes.")], chatml)
    assert trained_texts(prepared, chatml) == ["It is <|im_end|> here.<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_that_is_an_end_token_keeps_the_turn_s_own(name: str, byte_level: Tokenizer, prep: Prep) -> None:
    template, end, _ = KINDS[name]
    tokenizer = wrap(byte_level, template, eos=end)
    prepared = prep([chat("Which token ends a turn?", end, "So?", "Yes. " + end)], tokenizer)
    assert [t.replace(" ", "") for t in trained_texts(prepared, tokenizer)] == [end + end, "Yes." + end + end]


def test_a_tokenizer_that_changes_text_is_verified_by_what_it_decodes_to(metaspace: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(metaspace, kit.PLAIN_STYLE, eos="<|eos|>")
    prepared = prep([chat("Which ﬁsh?", "A ﬁne ﬁsh, ½ a pound."), chat("And?", "  indented\n")], tokenizer)
    assert [text.strip() for text in trained_texts(prepared, tokenizer)] == ["A fine fish, 1⁄2 a pound.<|eos|>"]
    assert prepared.train.sample(0)[0].tolist().count(tokenizer.bos_token_id) == 1


def test_answers_in_the_prompt_of_a_chat_completion_are_context(chatml: Any, prep: Prep) -> None:
    messages = TALK["messages"]
    prepared = prep([{"prompt": messages[:4], "completion": messages[4:]}], chatml)
    assert trained_texts(prepared, chatml) == ["An accent:\n  é, 漢字.<|im_end|>"]
    prompt, reference = prepared.train.prompt(0)
    assert chatml.decode(prompt) == chatml.apply_chat_template(messages[:4], tokenize=False, add_generation_prompt=True)
    assert chatml.decode(reference) == "An accent:\n  é, 漢字.<|im_end|>"


@pytest.mark.parametrize(
    "prompt, completion", [("def f", "oo(): pass"), ("Q: 1+1\nA:", " 2"), ("tail  ", "  x"), ("", "all of it")]
)
def test_plain_completion_starts_at_the_first_token_the_prompt_does_not_have(
    prompt: str, completion: str, base: Any, prep: Prep
) -> None:
    """TRL's rule, written out: tokenize both, count the tokens they begin with in common; EOS at the end."""
    whole = base(prompt + completion)["input_ids"] + [base.eos_token_id]
    alone = base(prompt)["input_ids"]
    common = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    ids, mask = prep([{"prompt": prompt, "completion": completion}], base).train.sample(0)
    assert ids.tolist() == whole
    assert mask.tolist() == [int(i >= max(common, 1)) for i in range(len(whole))]


def test_an_end_that_is_there_already_is_not_doubled(base: Any, prep: Prep) -> None:
    ids, _ = prep([{"text": "A story.<|eos|>"}], base).train.sample(0)
    assert ids.tolist().count(base.eos_token_id) == 1


@pytest.mark.parametrize("rows", [[{"text": "Once upon a time."}], [{"prompt": "Once upon", "completion": " a time."}]])
def test_pad_that_is_eos_does_not_unlearn_it(rows: list[dict[str, str]], byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(byte_level, None, eos="<|eos|>", pad="<|eos|>")
    ids, mask = prep(rows, tokenizer).train.sample(0)
    assert ids[-1] == tokenizer.pad_token_id and mask[-1] == 1


def test_train_on_all_covers_everything_but_the_first_token(chatml: Any, prep: Prep) -> None:
    _, mask = prep([TALK], chatml, train_on="all").train.sample(0)
    assert mask.tolist() == [0] + [1] * (len(mask) - 1)


def test_pretrain_trains_every_token_and_loses_none_of_a_long_document(base: Any, prep: Prep) -> None:
    text = " ".join(f"word{i}" for i in range(100))
    prepared = prep([{"text": text}], base, objective="pretrain", max_length=16)
    whole = [*base(text)["input_ids"], base.eos_token_id]
    targets: list[int] = []
    for i in range(len(prepared.train)):
        ids, mask = prepared.train.sample(i)
        assert len(ids) <= 16 and mask[0] == 0 and mask[1:].all()
        targets += ids[1:].tolist()
    assert targets == whole[1:]


@pytest.mark.parametrize(
    "template, rows, says",
    [
        (
            kit.NO_SYSTEM,
            [chat("a", "b"), TALK],
            r"train.jsonl, line 2: the chat template of tiny fails on role 'system' \(message 1\)",
        ),
        (kit.LOSES_CONTENT, [TALK], r"train.jsonl, line 1: cannot tell where the assistant's turns lie"),
        (kit.GENERATION.replace("{{ m.content }}<", "{{ m.content[:3] }}<", 1), [TALK], "does not hold its content"),
        (
            kit.GENERATION.replace("'assistant'", "'nobody'"),
            [TALK],
            "marks 0 parts with {% generation %} for 2 assistant turns",
        ),
        ("{% for m in messages %}{{ m.contents.x }}{% endfor %}", [TALK], "fails on role 'system' .* UndefinedError"),
        ("{% for m in %}", [TALK], "the chat template of tiny, line 1: not a Jinja template"),
    ],
)
def test_a_template_that_fails_is_refused_with_the_row(
    template: str, rows: list[Any], says: str, byte_level: Tokenizer, prep: Prep
) -> None:
    with pytest.raises(DataError, match=says):
        prep(rows, wrap(byte_level, template))


class LowerCase(PreTrainedTokenizerFast):
    """Changes text before its tokenizer.json sees it, as tokenizers with code of their own do."""

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return super().__call__(text.lower() if isinstance(text, str) else [t.lower() for t in text], **kwargs)


@pytest.mark.parametrize("row", [chat("Hello", "There"), {"text": "Hello There"}])
def test_a_tokenizer_whose_own_call_gives_other_ids_is_refused(row: Any, byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = LowerCase(tokenizer_object=byte_level, bos_token="<|bos|>", eos_token="<|im_end|>")
    tokenizer.chat_template = kit.CHATML
    with pytest.raises(DataError, match=r"gives other ids when it is called than its tokenizer\.json does"):
        prep([row], tokenizer)


def test_truncation_and_padding_left_in_tokenizer_json_do_nothing(byte_level: Tokenizer, prep: Prep) -> None:
    backend = Tokenizer.from_str(byte_level.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>")
    tokenizer.chat_template = kit.CHATML
    prepared = prep([TALK, chat("Hello", "Hi there.")], tokenizer)
    assert trained_texts(prepared, tokenizer, 1) == ["Hi there.<|im_end|>"]
    assert prepared.train.lengths[1] < 30 < prepared.train.lengths[0]


def test_tools_reach_the_template(byte_level: Tokenizer, prep: Prep) -> None:
    template = "{% if tools %}<|system|>{{ tools[0].function.name }}\n{% endif %}" + kit.CHATML
    tokenizer = wrap(byte_level, template)
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
    prepared = prep([TALK | {"tools": tools}, TALK | {"tools": None}], tokenizer)
    assert "weather" in tokenizer.decode(prepared.train.sample(0)[0])
    assert "weather" not in tokenizer.decode(prepared.train.sample(1)[0])


def test_a_tool_call_is_part_of_the_turn_that_makes_it(byte_level: Tokenizer, prep: Prep) -> None:
    call = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    tokenizer = wrap(byte_level, kit.CHATML.replace("{{ m.content }}", "{{ m.content }}" + call))
    asked = chat("Weather?", "Let me look.", "And now?", "Rain.")
    calling = chat("Weather?", "Let me look.", "And now?", "Rain.")
    calling["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    silent = {"messages": [asked["messages"][0], calling["messages"][1] | {"content": None}]}
    prepared = prep([asked, calling, silent], tokenizer)
    assert trained_texts(prepared, tokenizer, 0) == ["Let me look.<|im_end|>", "Rain.<|im_end|>"]
    assert trained_texts(prepared, tokenizer, 1) == ["Let me look.<call>weather</call><|im_end|>", "Rain.<|im_end|>"]
    assert trained_texts(prepared, tokenizer, 2) == ["<call>weather</call><|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "alpaca"])
def test_templates_by_name(name: str, byte_level: Tokenizer, prep: Prep) -> None:
    tokenizer = wrap(byte_level, None)
    prepared = prep([TALK], tokenizer, chat_template=name)
    assert trained_texts(prepared, tokenizer) == ["Four.<|im_end|>", "An accent:\n  é, 漢字.<|im_end|>"]
    tokenizer.chat_template = prepared.chat_template  # what is saved with the model
    assert tokenizer.apply_chat_template(TALK["messages"], return_dict=False) == prepared.train.sample(0)[0].tolist()
