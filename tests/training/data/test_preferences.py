"""Pairs and labelled answers: what each layout becomes, what is refused, and pairs read as two labelled answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher.errors import DataError
from trebuchet.launcher.schema import Data
from trebuchet.training.data import PairSet
from trebuchet.training.data.curate import curate
from trebuchet.training.data.curate.export import export
from trebuchet.training.data.units import JudgedSet

from .conftest import Prep
from .kit import write_jsonl
from .test_duplicates import corpus


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"{i}+{i}=", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}"}


LAYOUTS: list[dict[str, Any]] = [
    {"prompt": [turn("user", "Q")], "chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no")]},
    {"prompt": "Q", "chosen": turn("assistant", "yes"), "rejected": turn("assistant", "no")},
    {side: [turn("user", "Q"), turn("assistant", text)] for side, text in (("chosen", "yes"), ("rejected", "no"))},
    {"prompt": [turn("user", "Q")], "chosen": [{"from": "gpt", "value": "yes"}], "rejected": {"from": "gpt", "value": "no"}},
]  # fmt: skip


@pytest.mark.parametrize("row", LAYOUTS, ids=["messages", "one message", "no prompt", "sharegpt"])
def test_every_layout_of_a_pair_is_the_same_pair(row: dict[str, Any], chatml: Any, prep: Prep) -> None:
    wanted = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    units = prep([row] * 2, chatml, objective="dpo").train
    assert isinstance(units, PairSet)
    for (ids, mask), text in zip(units.documents(0), ("yes", "no"), strict=True):
        assert chatml.decode(ids) == wanted.format(text)
        assert chatml.decode(ids[mask == 1]) == f"{text}<|im_end|>"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "Q", "chosen": " a", "rejected": " a"}, "chosen and rejected are equal, so there is nothing to prefer"),
        ({"prompt": "Q", "chosen": "", "rejected": " a"}, "chosen is empty"),
        ({"prompt": "Q", "chosen": " a", "rejected": None}, "column rejected is null"),
        ({"prompt": "Q", "chosen": 3, "rejected": " a"}, "must be text or lists of messages"),
        ({"prompt": [turn("user", "Q")], "chosen": [], "rejected": [turn("assistant", "b")]}, "no assistant turn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_pair_that_is_none_is_named_or_left_out(
    row: dict[str, Any], says: str, objective: str, base: Any, prep: Prep
) -> None:
    rows = [pair(1), row, pair(2)]
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*({says})"):
        prep(rows, base, objective=objective)
    prepared = prep(rows, base, objective=objective, skip_bad_rows=True)
    assert prepared.report.sources[0].bad_rows == 1 and len(prepared.train) == (4 if objective == "kto" else 2)


def judged(i: int, label: Any) -> dict[str, Any]:
    return {"prompt": f"{i}+{i}=", "completion": f" {2 * i}", "label": label}


@pytest.mark.parametrize("label, use", [(True, "sft"), (False, "dpo, with pairs")])
def test_kto_with_one_label_only(label: bool, use: str, base: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=rf"all 3 rows have label {str(label).lower()}.*objective: {use}"):
        prep([judged(i, label) for i in range(3)], base, objective="kto")


@pytest.mark.parametrize("label, says", [("maybe", "column label is 'maybe'"), (None, "column label is missing")])
def test_a_label_that_is_none(label: Any, says: str, base: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=rf"line 3: {says}; it must be true or false"):
        prep([judged(0, True), judged(1, False), judged(2, label)], base, objective="kto")


@pytest.mark.parametrize("spelled", [(1, 0), ("true", "false"), ("True", "0")])
def test_labels_as_files_spell_them(spelled: tuple[Any, Any], base: Any, prep: Prep) -> None:
    units = prep([judged(i, spelled[i % 2]) for i in range(4)], base, objective="kto").train
    assert isinstance(units, JudgedSet) and units.labels.tolist() == [True, False, True, False]


@pytest.mark.parametrize("format", ["auto", "preference"])
def test_kto_reads_a_pair_as_two_labelled_answers(format: str, base: Any, prep: Prep) -> None:
    """The same tokens, masks, labels and prompts as the rows written out; the two answers to a prompt stay on one side of a split."""
    rows = [pair(i) for i in range(8)]
    written = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    units = prep(rows, base, objective="kto", format=format).train
    single = prep(written, base, objective="kto").train
    assert isinstance(units, JudgedSet) and isinstance(single, JudgedSet)
    assert len(units) == len(single) == 16 and units.labels.tolist() == single.labels.tolist()
    for i in range(16):
        for mine, theirs in zip(units.samples.sample(i), single.samples.sample(i), strict=True):
            assert mine.tolist() == theirs.tolist()
        assert units.mismatched(i)[0].tolist() == single.mismatched(i)[0].tolist()
    split = prep(rows, base, objective="kto", eval=0.25)
    sides = [[base.decode(units.prompt(i)[0]) for i in range(len(units))] for units in (split.train, split.eval)]
    assert [len(side) for side in sides] == [12, 4] and not set(sides[0]) & set(sides[1])


def test_chats_without_a_label_are_refused_with_what_kto_reads(chatml: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match="kto needs the column label"):
        prep([{"prompt": "a", "completion": "b"}], chatml, objective="kto")
    with pytest.raises(DataError, match="kto needs the column label"):
        prep(LAYOUTS[:1], chatml, objective="kto", format="kto")


def test_one_answer_of_a_pair_may_be_curated_away(tmp_path: Path) -> None:
    """The second pair's rejected answer is the first one's: it goes, its chosen one stays, and the export is rows that kto reads."""
    texts = corpus(4)
    rows = [
        {"prompt": "Q?", "chosen": texts[0], "rejected": texts[1], "id": 1},
        {"prompt": "Q?", "chosen": texts[2], "rejected": texts[1], "id": 2},
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = Data.model_validate({"train": [{"path": str(file)}], "eval": 0, "curate": True})
    decision = curate(data, kind="kto", roles=("assistant",), seed=0, cache=tmp_path / "cache")
    assert decision.train[0].tolist() == [0, 1, 2]
    [gone] = [json.loads(line) for line in (decision.folder / "dropped.jsonl").read_text().splitlines()]
    assert gone["row"].endswith("line 2") and gone["like"].endswith("line 1") and gone["step"] == "exact"
    made = export(decision, data, tmp_path / "out", kind="kto", roles=("assistant",))
    found = [json.loads(line) for line in made[0].read_text().splitlines()]
    assert found == [
        {"id": 1, "prompt": "Q?", "completion": texts[0], "label": True},
        {"id": 1, "prompt": "Q?", "completion": texts[1], "label": False},
        {"id": 2, "prompt": "Q?", "completion": texts[2], "label": True},
    ]
