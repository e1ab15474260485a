"""Curation from files to decisions: each step takes what was planted for it, names it, counts it, and does so again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trebuchet.launcher.errors import ConfigError, DataError, UserError
from trebuchet.launcher.schema import Data
from trebuchet.training.data.curate import Decision, curate
from trebuchet.training.data.curate.export import export

from .conftest import Prep
from .kit import chat, write_jsonl
from .test_duplicates import corpus, similarity

Call = Callable[..., Decision]
OFF: dict[str, Any] = {"near_duplicates": None, "exact_duplicates": False, "max_repetition": None, "damaged": False}
ALONE = OFF | {"leak_share": None}


def talk(answer: str, question: str = "Say something", **more: Any) -> dict[str, Any]:
    return chat(question, answer) | more


@pytest.fixture
def decide(tmp_path: Path) -> Call:
    """decide(rows, curate, seed=…, **keys of data): places that train, and the others."""

    def call(
        rows: list[Any], curated: Any, *, seed: int = 0, kind: str = "sft", cache: str = "cache", **data: Any
    ) -> Decision:
        path = write_jsonl(tmp_path / "train.jsonl", rows)
        section = Data.model_validate({"train": [{"path": str(path)}], "eval": 0, "curate": curated, **data})
        return curate(section, kind=kind, roles=("assistant",), seed=seed, cache=tmp_path / cache)

    return call


def dropped(decision: Decision) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (decision.folder / "dropped.jsonl").read_text().splitlines()]


def step(decision: Decision, name: str) -> Any:
    return next(step for step in decision.report.steps if step.name == name)


GOOD = "The capital of France is Paris, and it has been so for most of a thousand years."
LONG = " ".join(corpus(1)[0].split()[:30])


@pytest.mark.parametrize(
    "curated, rows, reason",
    [
        ({"min_words": 3}, [GOOD, "Too short"], "too short"),
        ({"max_words": 20}, [GOOD, LONG], "too long"),
        ({"max_repetition": 0.5}, [corpus(1)[0], "again and again the same " * 20], "repetition"),
        ({"damaged": True}, [GOOD, "voilÃ\u00a0 le texte"], "damaged characters"),
        ({"damaged": True}, ["naïve café – “ok” 日本語 №\t\r\n🙂", "gone \ufffd gone"], "damaged characters"),
        ({"damaged": True}, [GOOD, "bell \x07"], "damaged characters"),
        ({"refusals": True}, ["I'm sorry to hear that, but he cannot sing.", "I'm sorry, but I can't help with that."], "refusal"),
        ({"refusals": True}, ["An AI model is a program.", "As an AI language model, I do not eat."], "refusal"),
        ({"languages": ["en"]}, [GOOD, "Die Hauptstadt von Frankreich ist seit fast tausend Jahren Paris."], "language de"),
    ],
)  # fmt: skip
def test_a_filter_drops_the_second_row_and_says_why(
    curated: dict[str, Any], rows: list[str], reason: str, decide: Call
) -> None:
    decision = decide([talk(row) for row in rows], OFF | curated)
    assert decision.train[0].tolist() == [0]
    [line] = dropped(decision)
    assert line["row"].endswith("train.jsonl, line 2") and (line["step"], line["why"]) == ("filters", reason)
    assert dict(step(decision, "filters").detail) == {reason: 1} and step(decision, "filters").left == 1


RULES = """
- {name: no links, field: $answer, drop_if_matches: 'https?://'}
- {name: scored, field: meta.score, keep_if_at_least: 0.5}
- {name: tasks, field: task, keep_if_in: [qa, code]}
- {name: brief, field: $prompt, drop_if_longer_than: 40}
"""


def test_rules_of_ones_own(decide: Call, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    good = {"task": "qa", "meta": {"score": 0.9}}
    rows = [
        talk("Fine.", **good),
        talk("See https://example.org", **good),
        talk("Fine.", task="qa", meta={"score": "0.4"}),
        talk("Fine.", task="qa"),
        talk("Fine.", task="chat", meta={"score": 1}),
        talk("Fine.", "x" * 41, **good),
    ]
    decision = decide(rows, OFF | {"rules": [str(tmp_path / "rules.yaml")]})
    assert decision.train[0].tolist() == [0]
    whys = [line["why"] for line in dropped(decision)]
    assert whys == ["rule no links", "rule scored", "rule scored", "rule tasks", "rule brief"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("- {name: a, field: b, drop_if_match: x}", "unknown condition drop_if_match; did you mean 'drop_if_matches'"),
        ("- {name: a, field: b, drop_if_matches: '('}", "rule 1 \\(a\\): missing \\)"),
        ("- {name: a, field: b}", "one condition a rule"),
        ("- {field: b, keep_if_in: [1]}", "needs a name and a field"),
        ("- {name: a, field: b, keep_if_at_least: high}", "cannot be 'high'"),
        ("rules: 3", "must be a list of rules"),
        ("- {", "rules cannot be read"),
    ],
)
def test_rules_that_are_wrong_are_all_named(text: str, says: str, decide: Call, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        decide([talk(GOOD)], OFF | {"rules": [str(tmp_path / "rules.yaml")]})


def test_a_function_of_ones_own_and_its_changes(decide: Call, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def keep(row):\n    return 'shouting' if row['messages'][1]['content'].isupper() else None\n")
    rows = [talk("Quiet."), talk("LOUD.")]
    decision = decide(rows, OFF | {"function": f"{code}:keep"})
    assert decision.train[0].tolist() == [0] and dropped(decision)[0]["why"] == "keep: shouting"
    code.write_text("def keep(row):\n    return True\n")
    assert decide(rows, OFF | {"function": f"{code}:keep"}).train[0].tolist() == [0, 1]
    code.write_text("def keep(row):\n    return row['no such column']\n")
    with pytest.raises(DataError, match=r"mine\.py:keep failed on a row: KeyError"):
        decide(rows, OFF | {"function": f"{code}:keep"})
    with pytest.raises(ConfigError, match="has no attribute 'other'"):
        decide(rows, OFF | {"function": f"{code}:other"})


def test_exact_and_near_duplicates_name_the_row_that_stays(decide: Call) -> None:
    texts = corpus(3)
    near = texts[1].split()
    near[10] = "elsewhere"
    rows = [talk(texts[0]), talk(texts[1]), talk(f"  {texts[0]}\n"), talk(" ".join(near)), talk(texts[2])]
    decision = decide(rows, ALONE | {"exact_duplicates": True, "near_duplicates": 0.7})
    assert decision.train[0].tolist() == [0, 1, 4]
    exact, like = dropped(decision)
    assert exact["step"] == "exact" and exact["like"].endswith("line 1")
    assert like["step"] == "near" and like["like"].endswith("line 2")
    questions = [f"Say something {text}" for text in (texts[1], " ".join(near))]
    assert like["similarity"] == round(similarity(*questions), 4)


def test_other_labels_and_other_rejected_answers_are_not_duplicates(decide: Call) -> None:
    judged = [{"prompt": "Q", "completion": corpus(1)[0], "label": label} for label in (True, False, True)]
    assert decide(judged, True, kind="kto").train[0].tolist() == [0, 1]
    pairs = [{"prompt": "Q", "chosen": "yes", "rejected": text} for text in (*corpus(2), corpus(1)[0])]
    assert decide(pairs, True, kind="preference").train[0].tolist() == [0, 1]


def test_filters_leave_answers_alone_that_are_there_to_be_avoided(decide: Call) -> None:
    no = "I'm sorry, but I can't help with that."
    pairs = [{"prompt": "Q", "chosen": "Sure.", "rejected": no}, {"prompt": "Q2", "chosen": no, "rejected": "Sure."}]
    assert decide(pairs, OFF | {"refusals": True}, kind="preference").train[0].tolist() == [0]
    judged = [{"prompt": "Q", "completion": no, "label": label} for label in (False, True)]
    assert decide(judged, OFF | {"refusals": True}, kind="kto").train[0].tolist() == [0]


@pytest.mark.parametrize("at_most, left", [("smallest", [3, 3, 3]), ("median", [5, 5, 3]), (4, [4, 4, 3])])
def test_balance_caps_each_value(at_most: Any, left: list[int], decide: Call) -> None:
    kinds = ["qa"] * 9 + ["code"] * 5 + ["chat"] * 3
    rows = [talk(f"Answer {i}", f"Question {i}", meta={"task": kind}) for i, kind in enumerate(kinds)]
    decision = decide(rows, ALONE | {"balance": {"by": "meta.task", "at_most": at_most}})
    kept = [kinds[place] for place in decision.train[0]]
    assert [kept.count(kind) for kind in ("qa", "code", "chat")] == left
    assert sum(step(decision, "balance").detail.values()) == len(rows) - sum(left)
    other = decide(rows, ALONE | {"balance": {"by": "meta.task", "at_most": at_most}}, seed=1)
    assert len(other.train[0]) == sum(left) and other.train[0].tolist() != decision.train[0].tolist()


def family(count: int) -> list[dict[str, Any]]:
    """Groups of three near-duplicates each, under prompts of their own."""
    draw, rows = random.Random(3), []
    for text in corpus(count):
        for _ in range(3):
            said = text.split()
            said[draw.randrange(len(said))] = f"other{draw.randrange(10**6)}"
            rows.append(talk(" ".join(said), f"Question {len(rows)}"))
    return rows


def test_the_split_is_by_groups_of_near_duplicates(decide: Call) -> None:
    """Every pair of one row that trains and one that is held out is compared by its real 3-grams; a link of exactly 0.5 is found
    with probability 0.64, one of 0.7 with 0.99."""
    rows = family(60)
    decision = decide(rows, OFF, eval=0.2)
    assert decision.held is not None
    train, held = decision.train[0].tolist(), decision.held[0].tolist()
    assert abs(len(held) - 0.2 * len(rows)) <= 3 and not set(train) & set(held)
    text = [f"{row['messages'][0]['content']} {row['messages'][1]['content']}" for row in rows]
    assert max(similarity(text[i], text[j]) for i in train for j in held) < 0.7
    assert decide(rows, OFF, eval=0.2, seed=1).held[0].tolist() != held  # type: ignore[index]


def test_rows_that_leak_into_a_held_out_file_are_named_and_removed(decide: Call, tmp_path: Path) -> None:
    """One is inside a longer row (few 3-grams in common), one has every twelfth word changed (a third of its 8-grams is left)."""
    texts = corpus(8, seed=5)
    around = " ".join(corpus(3, seed=6))
    changed = [word if i % 12 else f"new{i}" for i, word in enumerate(texts[1].split())]
    held = write_jsonl(tmp_path / "held.jsonl", [talk(texts[0], "A question"), talk(texts[1], "Another question")])
    rows = [talk(f"{around} A question {texts[0]}"), talk(" ".join(changed), "Another question"), talk(texts[2])]
    decision = decide(rows, OFF, eval=str(held))
    assert decision.train[0].tolist() == [2] and decision.held is None
    inside, alike = dropped(decision)
    assert inside["step"] == "leaks" and inside["similarity"] >= 0.9 and inside["like"].endswith("held.jsonl, line 1")
    assert alike["step"] == "hold-out" and alike["like"].endswith("held.jsonl, line 2")


def test_a_system_prompt_that_rows_share_makes_nothing_similar(decide: Call) -> None:
    system = " ".join(corpus(2, seed=9))
    rows = [chat(f"Question {i} {text}", text, system=system) for i, text in enumerate(corpus(4))]
    assert len(decide(rows, True, eval=0.25).train[0]) == 3


def test_everything_follows_from_files_section_and_seed(decide: Call) -> None:
    rows = [*family(20), *(talk(text) for text in corpus(40, seed=2))]
    wanted = {"balance": {"by": "messages", "at_most": 1}, "near_duplicates": 0.8}
    first, again = decide(rows, wanted, eval=0.1), decide(rows, wanted, eval=0.1, cache="elsewhere")
    assert not again.cached
    assert first.report.fingerprint == again.report.fingerprint and first.report.steps == again.report.steps
    assert dropped(first) == dropped(again)
    for one, other in zip((*first.train, *first.held), (*again.train, *again.held), strict=True):  # type: ignore[misc]
        assert one.tolist() == other.tolist()
    assert decide(rows, wanted, eval=0.1).cached
    gone = sum(step.removed for step in first.report.steps)
    assert gone == len(dropped(first)) == len(rows) - first.report.train - first.report.held_out
    assert first.report.train == len(first.train[0]) and first.report.steps[-1].left == first.report.train
    assert not decide(rows, wanted, eval=0.1, seed=1).cached


def test_a_changed_filter_is_judged_anew_and_the_record_says_with_what(decide: Call) -> None:
    rows = [talk(GOOD), talk("short")]
    assert len(decide(rows, OFF).train[0]) == 2
    tight = decide(rows, OFF | {"min_words": 5})
    assert len(tight.train[0]) == 1 and step(tight, "filters").limits["min_words"] == 5


def test_nothing_left_is_an_error(decide: Call) -> None:
    with pytest.raises(DataError, match="the training data is empty: curation leaves none of 1 rows"):
        decide([talk("short")], {"min_words": 50})


def test_unknown_languages_are_named(decide: Call) -> None:
    with pytest.raises(UserError, match="xx is not a code that py3langid knows"):
        decide([talk(GOOD)], {"languages": ["xx"]})


def test_prepare_trains_what_curation_left_and_records_it(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    rows = [*(talk(text, f"Question {i}") for i, text in enumerate(corpus(30))), talk(corpus(1)[0], "Question 0")]
    prepared = prep(rows, chatml, curate=True, eval=0.1, max_length=4096)
    report = prepared.report.curation
    assert report is not None and report.train == len(prepared.train)
    assert prepared.eval is not None and report.held_out == len(prepared.eval)
    assert len(prepared.train) + len(prepared.eval) + sum(s.removed for s in report.steps) == len(rows)
    assert any(line.startswith("curated: 31 rows") for line in prepared.report.lines())
    json.dumps(prepared.report.to_dict())
    again = prep(rows, chatml, curate=True, eval=0.1, max_length=4096)
    assert again.report.cached and again.fingerprint == prepared.fingerprint


def test_general_data_make_up_their_share_and_are_never_held_out(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", [talk(f"General {i}.", f"General {i}?") for i in range(500)])
    rows = [talk(f"Answer {i}.", f"Question {i}?") for i in range(200)]
    for curated in (None, ALONE):
        prepared = prep(rows, chatml, eval=0.1, general={"path": str(general), "share": 0.25}, curate=curated)
        assert prepared.eval is not None and set(prepared.eval.source.tolist()) == {0}
        counts = np.bincount(prepared.train.source)
        assert counts.tolist() == [180, 60]
        assert "general data: 60 of 240 training samples, 25.0%" in prepared.report.notes


def test_curated_rows_are_exported_as_they_were(decide: Call, tmp_path: Path) -> None:
    rows = [talk(text, f"Question {i}", source="book") for i, text in enumerate(corpus(20))] * 2
    decision = decide(rows, True, eval=0.1)
    data = Data.model_validate({"train": [{"path": str(tmp_path / "train.jsonl")}], "eval": 0.1, "curate": True})
    train, held, gone = export(decision, data, tmp_path / "out", kind="sft", roles=("assistant",))
    assert decision.held is not None
    for path, places in ((train, decision.train[0]), (held, decision.held[0])):
        assert [json.loads(line) for line in path.read_text().splitlines()] == [rows[place] for place in places]
    assert len(gone.read_text().splitlines()) == len(rows) - len(decision.train[0]) - len(decision.held[0])
