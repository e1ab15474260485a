"""Rows that are wrong: named with file and line, or left out, counted and listed when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher import api
from trebuchet.launcher.errors import DataError
from trebuchet.launcher.schema import Source
from trebuchet.training.data import samples as samples_module
from trebuchet.training.data.readers import RowError
from trebuchet.training.data.tables import open_table

from .conftest import Prep
from .kit import NO_SYSTEM, chat, chats, wrap, write_jsonl

BAD: list[tuple[str, str]] = [
    ('{"messages": [{"role": "user"', "not JSON"),
    ('{"text": "x"}', "column messages is missing"),
    ('{"messages": null}', "column messages is null"),
    (
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}]}',
        r"message 2 \(assistant\) is empty",
    ),
    (
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "A"}]}',
        r"message 1 \(user\) has no content",
    ),
    (
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, '
        '{"role": "system", "content": "S2"}, {"role": "assistant", "content": "A"}]}',
        "message 3 is a second system prompt",
    ),
    ("[1, 2]", "not a JSON object but an array"),
]


@pytest.mark.parametrize("line, says", BAD)
def test_a_bad_row_is_named_or_left_out(line: str, says: str, chatml: Any, prep: Prep, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*map(json.dumps, chats(3)), line, *map(json.dumps, chats(2))]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"train\.jsonl, line 4: {says}"):
        prep(str(path), chatml)
    prepared = prep(str(path), chatml, skip_bad_rows=True)
    report = prepared.report.sources[0]
    assert (report.rows, report.bad_rows, len(prepared.train)) == (6, 1, 5)
    assert report.bad[0].startswith("line 4: ")
    assert any("1 bad rows left out" in said for said in prepared.report.lines())
    with pytest.raises(DataError, match="line 4"):  # the entry is there now, and is refused all the same
        prep(str(path), chatml)


def test_all_bad_rows_are_counted_and_listed(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    lines = [*map(json.dumps, chats(4)), *(line for line, _ in BAD)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    report = prep(str(path), chatml, skip_bad_rows=True).report.sources[0]
    assert report.bad_rows == len(BAD) == len(report.bad)
    assert [line.split(":")[0] for line in report.bad] == [f"line {n}" for n in range(5, len(BAD) + 5)]
    assert (
        json.loads(json.dumps(prep(str(path), chatml, skip_bad_rows=True).report.to_dict()))["sources"][0]["bad_rows"]
        == 7
    )


def test_a_role_that_the_template_refuses(byte_level: Any, prep: Prep) -> None:
    rows = [*chats(2), chat("Q", "A", system="S")]
    tokenizer = wrap(byte_level, NO_SYSTEM)
    with pytest.raises(DataError, match=r"line 3: .* fails on role 'system' \(message 1\)"):
        prep(rows, tokenizer)
    assert prep(rows, tokenizer, skip_bad_rows=True).report.sources[0].bad_rows == 1


def test_nothing_but_bad_rows(chatml: Any, prep: Prep) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl is empty: all 2 rows are bad"):
        prep([{"messages": []}, {"messages": 3}], chatml, skip_bad_rows=True)


def test_a_row_of_50_mb(chatml: Any, prep: Prep, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [chat("Q", "A"), chat("Q", "x" * 50_000_000)]
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: the row has 50\.0 MB; 40 are the most, split it"):
        prep(large, chatml)
    assert len(prep(large, chatml, skip_bad_rows=True).train) == 1
    monkeypatch.setattr(samples_module, "LARGEST", 1000)
    with pytest.raises(DataError, match=r"line 2: holds 0\.0 million characters"):
        prep([chat("Q", "A"), chat("Q", "x" * 2000)], chatml)


@pytest.mark.parametrize(
    "name, content, bad",
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xe9"}\n{"text": "y"}\n',
            "line 2: not UTF-8 text (byte 0xe9 at position 11)",
        ),
        ("a.json", b'[{"text": "x"},\n{"text": "\xe9"},\n{"text": "y"}]', "line 2: not UTF-8 text (byte 0xe9)"),
        ("a.csv", b"text,n\nx,1\n\xe9,2\ny,3\n", "line 3: not UTF-8 text (byte 0xe9)"),
    ],
)
def test_a_row_in_another_encoding(name: str, content: bytes, bad: str, base: Any, prep: Prep, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prep(str(tmp_path / name), base)
    assert f"{name}, {bad}" in str(caught.value)
    prepared = prep(str(tmp_path / name), base, skip_bad_rows=True)
    assert len(prepared.train) == 2 and prepared.report.sources[0].bad == (bad,)


def test_damage_of_a_whole_file_is_an_error_also_when_rows_are_skipped(base: Any, prep: Prep, tmp_path: Path) -> None:
    """How many rows are lost cannot be known, so nothing could be counted."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}] * 5000), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        prep(str(path), base, skip_bad_rows=True)
    (tmp_path / "a.json").write_text('[{"text": "x"},')
    with pytest.raises(DataError, match="the array is not closed"):
        prep(str(tmp_path / "a.json"), base, skip_bad_rows=True)


def test_fewer_samples_than_one_batch(tiny_config: Any, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", chats(3))
    with pytest.raises(DataError, match=r"few\.jsonl: 3 training samples are fewer than one global batch of 4"):
        api.begin(tiny_config({"data.train": str(few), "data.eval": 0}, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


pieces = st.lists(st.sampled_from([b'{"text": "a"}', b"{", b"", b"\xff", b"1", b'"', b","]), max_size=5).map(b"\n".join)


@settings(max_examples=150)
@given(content=st.binary(max_size=60) | pieces, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_any_bytes_give_rows_or_one_sentence(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No reader raises anything but DataError, and of JSON lines every line that is not blank is a row or a reason."""
    path = tmp_path_factory.mktemp("any") / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = list(open_table(Source(path=str(path))).rows())
    except DataError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    assert all(isinstance(row, (dict, RowError)) for _, row in rows)
    numbers = [number for number, _ in rows]
    assert numbers == sorted(numbers)
    if suffix == ".jsonl":
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert numbers == [n for n, line in enumerate(lines, start=1) if line.strip()]


@settings(max_examples=60)
@given(cut=st.floats(0, 1), flip=st.none() | st.floats(0, 1))
def test_a_damaged_parquet_file_is_never_read_in_part_without_a_word(
    cut: float, flip: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    rows = [{"text": f"row {i}"} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, write_page_checksum=True)
    whole = bytearray(path.read_bytes())
    damaged = whole[: int(cut * len(whole))]
    if flip is not None and damaged:
        damaged[int(flip * (len(damaged) - 1))] ^= 0xFF
    path.write_bytes(bytes(damaged))
    try:
        found = [row for _, row in open_table(Source(path=str(path))).rows()]
    except DataError:
        return
    assert found == rows and damaged == whole
