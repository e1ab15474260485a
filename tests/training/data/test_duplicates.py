"""Near-duplicates against exact Jaccard similarities of all pairs, leaks against a plain double loop, groups against a search."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.training.data.curate import duplicates, words
from trebuchet.training.data.curate import texts as texts_module
from trebuchet.training.data.curate.leaks import HeldOut
from trebuchet.training.data.curate.texts import Texts
from trebuchet.training.data.curate.words import Numbering, signatures

VOCABULARY = [f"word{i}" for i in range(3000)]
WEIGHTS = [1 / (i + 10) for i in range(3000)]  # Zipf's law, flattened at the top


def grams(text: str, n: int = 3) -> set[tuple[str, ...]]:
    """Independent of the code under test: sets of tuples of strings."""
    found = re.findall(r"[-+*/=<>^%]|\w+", text.lower())
    return {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}


def similarity(a: str, b: str) -> float:
    one, other = grams(a), grams(b)
    return len(one & other) / len(one | other)


def corpus(count: int, seed: int = 0) -> list[str]:
    """Texts of 30 to 120 words; every fifth is an earlier one with 2, 5 or 10 % of its words replaced."""
    draw = random.Random(seed)
    texts: list[str] = []
    for i in range(count):
        if i % 5 == 4:
            copy = draw.choice(texts).split()
            for place in draw.sample(range(len(copy)), max(1, round(len(copy) * draw.choice((0.02, 0.05, 0.1))))):
                copy[place] = draw.choice(VOCABULARY)
            texts.append(" ".join(copy))
        else:
            texts.append(" ".join(draw.choices(VOCABULARY, WEIGHTS, k=draw.randint(30, 120))))
    return texts


def joined(arrays: list[np.ndarray], files: int = 1) -> Texts:
    """Texts in one file, or dealt out to several as those of several sheets are."""
    owner = np.arange(len(arrays)) % files
    lengths = np.array([len(a) for a in arrays], np.int64)
    start = np.zeros(len(arrays), np.int64)
    for file in range(files):
        start[owner == file] = np.cumsum(lengths[owner == file]) - lengths[owner == file]
    parts = [[a for a, mine in zip(arrays, owner == file, strict=True) if mine] for file in range(files)]
    return Texts(files=[np.concatenate(p) for p in parts], file=owner, start=start, lengths=lengths)


def arrays(texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    numbering = Numbering()
    made = [np.array(words.filled(numbering.words(text)), np.uint32) for text in texts]
    return made, signatures(np.concatenate(made), np.array([len(m) for m in made]))


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=12), min_size=2, max_size=9),
    files=st.integers(1, 2),
    at_once=st.sampled_from([1, 20, 10_000]),
    data=st.data(),
)
def test_similarities_are_those_of_plain_sets(
    rows: list[list[int]], files: int, at_once: int, data: st.DataObject
) -> None:
    """Whatever the cut into calls, in any order, with the same text on both sides too."""
    place = st.integers(0, len(rows) - 1)
    pairs = data.draw(st.lists(st.tuples(place, place), min_size=1, max_size=20))
    first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    sets = [{tuple(row[i : i + 3]) for i in range(len(row) - 2)} for row in rows]
    expected = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(texts_module, "_AT_ONCE", at_once)
        found = joined([np.array(row, np.uint32) for row in rows], files).similarities(first, second)
    assert found.tolist() == expected


@pytest.fixture(scope="module")
def made() -> tuple[list[str], dict[tuple[int, int], float], list[np.ndarray], np.ndarray]:
    """800 texts and the exact similarity of all their pairs above 0.3, found over shared 3-grams."""
    texts = corpus(800)
    by_gram: dict[tuple[str, ...], list[int]] = {}
    for i, text in enumerate(texts):
        for gram in grams(text):
            by_gram.setdefault(gram, []).append(i)
    pairs = {(i, j) for owners in by_gram.values() for i in owners for j in owners if i < j}
    exact = {pair: s for pair in pairs if (s := similarity(texts[pair[0]], texts[pair[1]])) > 0.3}
    return texts, exact, *arrays(texts)


@pytest.mark.parametrize("threshold, recall", [(0.7, 0.98), (0.8, 0.98), (0.5, 0.8)])
def test_recall_and_precision_against_exact_jaccard(made: object, threshold: float, recall: float) -> None:
    """Bands of 4 find J = 0.7 with probability 1 - (1 - 0.7^4)^16 = 0.988, J = 0.5 with 0.64; both less the estimate's slack, and
    most pairs lie above their threshold. Precision is exact: every pair is compared by its 3-grams."""
    _, exact, texts, signed = made  # type: ignore[misc]
    wanted = {pair for pair, s in exact.items() if s >= threshold}
    found = duplicates.similar_pairs(signed, joined(texts), threshold)
    pairs = dict(
        zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.similarity.tolist(), strict=True)
    )
    assert len(wanted) > 50
    assert set(pairs) <= wanted
    assert len(set(pairs) & wanted) >= recall * len(wanted)
    assert all(abs(s - exact[pair]) < 1e-12 for pair, s in pairs.items())


def test_signatures_estimate_jaccard_without_bias(made: object) -> None:
    """The mean error over all similar pairs is within 4 standard errors of sqrt(J (1 - J) / 64) each."""
    _, exact, _, signed = made  # type: ignore[misc]
    errors = np.array([(signed[i] == signed[j]).mean() - s for (i, j), s in exact.items()])
    deviation = np.sqrt(np.mean([s * (1 - s) / 64 for s in exact.values()]))
    assert abs(errors.mean()) < 4 * deviation / np.sqrt(len(errors))
    assert errors.std() < 1.2 * deviation


def test_signatures_do_not_depend_on_what_else_is_in_the_call(made: object) -> None:
    texts, _, arrays_of, signed = made  # type: ignore[misc]
    for i in (0, 17, len(texts) - 1):
        alone = signatures(arrays_of[i], np.array([len(arrays_of[i])]))
        assert (alone[0] == signed[i]).all()


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("5 + 3 = 8", "5 - 3 = 2", False),  # an operator is a word
        ("Hello,  World!", "hello world", True),  # case and punctuation are not
        ("今日は良い天気です", "今日は良い天気でした", False),  # characters of unspaced scripts are words
        ("", " \n", True),
        ("one", "one two", False),
    ],
)
def test_what_a_word_is(one: str, other: str, same: bool) -> None:
    numbering = Numbering()
    a, b = (np.array(words.filled(numbering.words(text)), np.uint32) for text in (one, other))
    there, back = joined([a, b]).similarities(np.array([0, 1]), np.array([1, 0])).tolist()
    assert (there == 1.0) is same and there == back


def test_the_first_stays_and_chains_do_not_carry() -> None:
    """0 ~ 1 ~ 2, but 0 and 2 are not alike: 1 goes, 2 stays. 3 is like 2, which stays, and goes."""
    pairs = duplicates.Pairs(
        first=np.array([0, 1, 2]), second=np.array([1, 2, 3]), similarity=np.array([0.8, 0.8, 0.9])
    )
    assert duplicates.to_drop(pairs) == {1: (0, 0.8), 3: (2, 0.9)}


@given(
    count=st.integers(1, 30),
    links=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40),
)
def test_groups_are_what_can_be_reached(count: int, links: list[tuple[int, int]]) -> None:
    links = [(i % count, j % count) for i, j in links]
    near: dict[int, set[int]] = {i: {i} for i in range(count)}
    for i, j in links:
        near[i].add(j)
        near[j].add(i)
    expected = []
    for start in range(count):
        seen, todo = {start}, [start]
        while todo:
            fresh = near[todo.pop()] - seen
            seen |= fresh
            todo += fresh
        expected.append(min(seen))
    first, second = (np.array([link[side] for link in links], np.int64) for side in (0, 1))
    assert duplicates.groups(count, (first, second)).tolist() == expected


def test_many_equal_rows_cost_no_square_of_pairs() -> None:
    texts, signed = arrays(["the same words again and again"] * 3000)
    found = duplicates.similar_pairs(signed, joined(texts), 0.7)
    assert len(found.first) < 3 * 3000
    assert set(duplicates.to_drop(found)) == set(range(1, 3000))
    assert set(duplicates.groups(3000, (found.first, found.second))) == {0}


@settings(max_examples=30)
@given(
    train=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=25), min_size=1, max_size=8),
    held=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=15), min_size=1, max_size=5),
    n=st.integers(2, 5),
    share=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_leaks_are_those_of_a_plain_double_loop(
    train: list[list[int]], held: list[list[int]], n: int, share: float
) -> None:
    def of(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + n]) for i in range(len(row) - n + 1)} or {tuple(row)}

    expected = {}
    for i, row in enumerate(train):
        shares = [len(of(row) & of(other)) / len(of(other)) for other in held]
        if max(shares) >= share:
            expected[i] = max(shares)
    index = HeldOut(np.array([w for h in held for w in h], np.uint32), np.array([len(h) for h in held]), n)
    found = index.leaking(np.array([w for t in train for w in t], np.uint32), np.array([len(t) for t in train]), share)
    assert {i: part for i, (_, part) in found.items()} == expected
    for i, (k, part) in found.items():
        assert len(of(train[i]) & of(held[k])) / len(of(held[k])) == part
