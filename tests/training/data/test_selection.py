"""Split, leaks and weights: which samples train, and which are held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.errors import DataError
from trebuchet.training.data import TokenSet, selection
from trebuchet.training.data.store import SAMPLE, Store

from .conftest import Prep
from .kit import chat, chats, write_jsonl


def made(prompts: list[int], lengths: list[int] | None = None) -> TokenSet:
    """A set of samples with these prompt keys; every sample differs."""
    lengths = lengths or [4] * len(prompts)
    records = np.zeros(len(prompts), SAMPLE)
    records["prompt"], records["length"] = prompts, lengths
    records["trained"] = records["length"] - 1
    records["whole"] = records["row"] = np.arange(len(prompts))
    records["offset"] = np.cumsum([0, *lengths[:-1]])
    total = sum(lengths)
    ids, mask = np.arange(total, dtype=np.int32), np.ones(total, np.uint8)
    return selection.whole([Store(key="", ids=ids, mask=mask, samples=records, meta={})])


@settings(max_examples=50)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=2, max_size=200),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_equal_prompts_stay_on_one_side_and_nothing_is_lost(prompts: list[int], share: float, seed: int) -> None:
    try:
        train, held = selection.hold_out(made(prompts), share, seed)
    except DataError:
        smallest = min(prompts.count(p) for p in set(prompts))
        assert 2 * smallest > len(prompts)
        return
    assert len(train) and len(held)
    assert sorted([*train.index.tolist(), *held.index.tolist()]) == list(range(len(prompts)))
    sides = [set(np.array(prompts)[part.index].tolist()) for part in (train, held)]
    assert not sides[0] & sides[1]
    assert len(held) <= max(1, round(share * len(prompts))) or len(sides[1]) == 1


def test_the_share_is_met_exactly_where_prompts_differ_and_moves_with_the_seed() -> None:
    samples = made(list(range(1000)))
    first = selection.hold_out(samples, 0.05, 0)[1].index
    assert len(first) == 50 and selection.hold_out(samples, 0.05, 0)[1].index.tolist() == first.tolist()
    assert set(selection.hold_out(samples, 0.05, 1)[1].index) != set(first)
    grown = selection.hold_out(made(list(range(1010))), 0.05, 0)[1].index
    assert len(set(grown) & set(first)) >= 45  # ten more rows move few of the others


@given(lengths=st.lists(st.integers(2, 100), min_size=1, max_size=20), limit=st.integers(8, 40))
def test_documents_are_split_without_losing_or_repeating_a_target(lengths: list[int], limit: int) -> None:
    samples = made(list(range(len(lengths))), lengths)
    pieces, split = selection.split_documents(samples, limit)
    assert split == sum(length > limit for length in lengths) and pieces.lengths.max() <= limit
    targets = [token for i in range(len(pieces)) for token in pieces.sample(i)[0][1:].tolist()]
    firsts = set(samples.start.tolist())
    assert targets == [token for token in range(sum(lengths)) if token not in firsts]
    assert pieces.trained().sum() == len(targets)


def test_weights_repeat_and_thin_out_sources(chatml: Any, prep: Prep, tmp_path: Any) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat(f"Other {i}", "Yes.") for i in range(10)])
    sources = [
        {"path": str(write_jsonl(tmp_path / "a.jsonl", chats(10))), "weight": 2.3},
        {"path": str(other), "weight": 0.5},
    ]
    prepared = prep([], chatml, train=sources)
    counts = np.bincount(prepared.train.index[prepared.train.source == 0], minlength=10)
    assert sorted(counts.tolist()) == [2] * 7 + [3] * 3
    thin = prepared.train.index[prepared.train.source == 1]
    assert len(thin) == len(set(thin.tolist())) == 5
    again = prep([], chatml, train=sources)
    assert again.report.cached and again.train.index.tolist() == prepared.train.index.tolist()
    assert prep([], chatml, train=sources, seed=1).train.index.tolist() != prepared.train.index.tolist()


def test_training_rows_that_are_held_out_are_removed_and_counted(chatml: Any, prep: Prep, tmp_path: Any) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [*chats(3), chat("Question 5?", "Another answer.")])
    prepared = prep([*chats(10), chats(1)[0]], chatml, eval=str(held))
    assert prepared.eval is not None and (len(prepared.train), len(prepared.eval)) == (7, 4)
    assert (prepared.report.leaked, prepared.report.shared_prompts) == (4, 1)
    assert "4 training samples stand in the held-out data too and were removed" in prepared.report.notes
    with pytest.raises(DataError, match=r"the training data is empty: all 3 samples stand in data\.eval too"):
        prep(chats(3), chatml, eval=str(held))


def test_eval_share_zero_and_the_default(chatml: Any, prep: Prep) -> None:
    assert prep(chats(40), chatml).eval is None
    prepared = prep(chats(40), chatml, eval=0.05)
    assert prepared.eval is not None and (len(prepared.train), len(prepared.eval)) == (38, 2)
    with pytest.raises(DataError, match="equal prompts stay on one side, and there is only 1 of them"):
        prep([chat("Tell me a joke", f"Joke {i}") for i in range(20)], chatml, eval=0.05)


def test_prompts_of_plain_text_are_its_first_half(base: Any, prep: Prep) -> None:
    samples = prep([{"text": "one two three four five six"}], base).train
    prompt, reference = samples.prompt(0)
    assert len(prompt) == len(samples.sample(0)[0]) // 2
    assert base.decode([*prompt, *reference]) == "one two three four five six<|eos|>"
