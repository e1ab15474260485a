"""Files of every kind, layouts of every kind, and what is said about rows that are wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.errors import DataError
from trebuchet.launcher.schema import Source
from trebuchet.training.data.readers import READERS, RowError
from trebuchet.training.data.tables import open_table

from .conftest import Prep
from .kit import chat, chats, trained_texts, write_jsonl

ROWS = [{"prompt": 'One, "two"\n', "completion": "three é"}, {"prompt": "a", "completion": "b\r\nc"}]


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    ".jsonl": write_jsonl,
    ".ndjson": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in rows)
    ),
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=2), encoding="utf-8"),
    ".csv": _write_csv,
    ".tsv": _write_csv,
    ".parquet": _write_parquet,
}


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_rows_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row for _, row in open_table(Source(path=str(path))).rows()] == ROWS


texts = st.text(st.characters(codec="utf-8"), max_size=8)
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | texts
    | st.lists(texts, max_size=3)
    | st.dictionaries(texts, texts, max_size=2)
)


@settings(max_examples=40)
@given(
    rows=st.lists(st.dictionaries(texts, values, max_size=3), max_size=4),
    indent=st.none() | st.integers(0, 3),
    lines=st.booleans(),
)
def test_json_rows_and_their_lines(
    rows: list[Any], indent: int | None, lines: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Arrays and objects one after another; the line is where an independent count finds the row's first brace."""
    parts = [json.dumps(row, indent=indent) for row in rows]
    text = "\n\n".join(parts) if lines else "[\n" + ",\n".join(parts) + "\n]"
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(text, encoding="utf-8")
    number, expected = (1 if lines else 2), []
    for row, written in zip(rows, parts, strict=True):
        expected.append((number, row))
        number += written.count("\n") + (2 if lines else 1)
    assert list(open_table(Source(path=str(path))).rows()) == expected


def test_csv_names_the_line_on_which_a_record_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n"1\n2",3\n4\n"5",6\n', encoding="utf-8")
    first, second, third = open_table(Source(path=str(path))).rows()
    assert first == (2, {"a": "1\n2", "b": "3"}) and third == (5, {"a": "5", "b": "6"})
    assert second[0] == 4 and isinstance(second[1], RowError)


LAYOUTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "messages": (chat("Q", "A", "Q2", "A2", system="S"), "S|Q|A|Q2|A2", ["A", "A2"]),
    "prompt-completion": (
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        "Q|A",
        ["A"],
    ),
    "alpaca": (
        {"instruction": "Do", "input": "this", "output": "A2", "system": "S", "history": [["Q", "A"]]},
        "S|Q|A|Do\n\nthis|A2",
        ["A", "A2"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
        "S|Q|A",
        ["A"],
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chat_layouts_are_recognised_in_every_kind_of_file(
    layout: str, suffix: str, chatml: Any, prep: Prep, tmp_path: Path
) -> None:
    row, contents, answers = LAYOUTS[layout]
    cells = {key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} if suffix == ".csv" else row
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [cells])
    prepared = prep(str(path), chatml)
    assert prepared.report.sources[0].layout == layout
    text = chatml.decode(prepared.train.sample(0)[0])
    assert [
        part.split("\n", 1)[1] for part in text.replace("<|im_end|>\n", "").split("<|im_start|>")[1:]
    ] == contents.split("|")
    assert trained_texts(prepared, chatml) == [answer + "<|im_end|>" for answer in answers]


def test_an_openai_style_conversations_column_is_read_too(chatml: Any, prep: Prep) -> None:
    assert trained_texts(prep([{"conversations": chat("Q", "A")["messages"]}], chatml), chatml) == ["A<|im_end|>"]


def test_columns_are_renamed_and_json_text_stays_text(base: Any, prep: Prep) -> None:
    rows = [{"question": "List:", "prompt": "not this", "answer": '[{"a": 1}]'}]
    prepared = prep(rows, base, columns={"prompt": "question", "completion": "answer"})
    assert base.decode(prepared.train.sample(0)[0]) == 'List:[{"a": 1}]<|eos|>'


def test_a_saved_dataset_and_a_split_of_one(base: Any, prep: Prep, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(str(tmp_path / "two"))
    whole = prep(str(tmp_path / "one"), base)
    part = prep(str(tmp_path / "two"), base, split="validation")
    assert len(whole.train) == 2 and len(part.train) == 1
    assert part.train.sample(0)[0].tolist() == whole.train.sample(1)[0].tolist()
    with pytest.raises(DataError, match="holds no split 'validate'; did you mean 'validation'"):
        prep(str(tmp_path / "two"), base, split="validate")


def test_broken_line_17_is_named(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in chats(30)]
    lines[16] = lines[16][:-5]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 17: not JSON: .* at column \d+\. It is the only bad row of 30"
    ):
        prep(str(path), chatml)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "files"]


def test_all_bad_rows_are_counted_and_three_shown(chatml: Any, prep: Prep) -> None:
    bad = [
        {"messages": []},
        chat("a", ""),
        chat("a"),
        {"messages": None},
        {"text": "x"},
        {"messages": [{"role": "user"}]},
    ]
    with pytest.raises(DataError) as caught:
        prep([chat("Q", "A"), *bad, *chats(2000), {"messages": 3}], chatml)
    assert "7 of 2,008 rows are bad" in str(caught.value) and "and 4 more" in str(caught.value)
    for said in (
        "line 2: messages is an empty list",
        "line 3: message 2 (assistant) is empty",
        "line 4: no assistant turn",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: not a JSON object but an array"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text is not text"),
        ("a.jsonl", b'{"text": "x"}\n{"texts": "x"}\n', "line 2: column text is missing"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.jsonl", b"", "is empty: it holds no rows"),
        (
            "a.json",
            b'[{"text": "x"},\n {"text": "y"}\n',
            "the array is not closed; the file seems to be cut off after 2 rows",
        ),
        ("a.json", b'[{"text": "x"},\n {"text" "y"}]\n', "line 2: not JSON: Expecting ':' delimiter at column 10"),
        ("a.json", b'{"data": [{"text": "x"}]}', r"the columns \(data\) fit no known layout"),
        ("a.csv", b'text,n\n"x,1\n', "line 2: not CSV: unexpected end of data"),
        ("a.csv", b"text,n\nx,1\ny\n", "line 3: 1 fields where the header has 2"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("a.txt", b"x", r"files ending in '\.txt' are not read; one of: \.jsonl"),
    ],
)
def test_files_that_are_wrong_are_named(
    name: str, content: bytes, says: str, base: Any, prep: Prep, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        prep(str(tmp_path / name), base)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_parquet_file_cut_in_half(base: Any, prep: Prep, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write_parquet(path, ROWS * 1000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        prep(str(path), base)


@pytest.mark.parametrize(
    "row, data, says",
    [
        (
            {"question": "a", "answer": "b"},
            {},
            r"columns \(answer, question\) fit no known layout .* columns: \{prompt: ",
        ),
        ({"chosen": "a", "rejected": "b"}, {}, "preference pairs"),
        ({"text": "a"}, {"format": "alpaca"}, "alpaca needs the column instruction, found: text"),
        ({"text": "a"}, {"columns": {"promt": "text"}}, r"columns\.promt: not a name we use; did you mean 'prompt'"),
        ({"text": "a"}, {"columns": {"prompt": "body"}}, "no column body in the first row, found: text"),
        ({"prompt": "a", "completion": "b"}, {"objective": "pretrain"}, "text needs the column text"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            {},
            "must both be text or both be lists",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, {}, "turn 1 is from 'alien'"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            {},
            "message 1 has a part that is not text",
        ),
    ],
)
def test_rows_that_fit_no_layout(row: dict[str, Any], data: dict[str, Any], says: str, base: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=says):
        prep([row], base, **data)


@pytest.mark.parametrize(
    "path, says",
    [
        ("trian.jsonl", "no such file .* did you mean 'train.jsonl'"),
        ("/nowhere/x.jsonl", "the folder does not exist either"),
        (".", "not one saved by datasets"),
    ],
)
def test_paths_that_lead_nowhere(
    path: str, says: str, base: Any, prep: Prep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        prep(path, base)


def test_a_hub_id_without_a_network_is_one_paragraph(base: Any, prep: Prep, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="no file or folder of that name here, and it could not be loaded from the Hub"
    ) as caught:
        prep("some-one/some-set", base)
    assert "\n" not in str(caught.value)
