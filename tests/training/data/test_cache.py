"""The cache: hit when nothing changed, miss when anything that matters did, one piece of work for many processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from trebuchet.launcher.errors import DataError
from trebuchet.training.data import Prepared
from trebuchet.training.data.store import Writer, build_store, open_store

from . import kit
from .conftest import Prep
from .kit import chats, wrap, write_jsonl


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.is_dir() and p.name != "files")


def test_a_second_call_maps_the_first_ones_files(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    first, second = prep(chats(20), chatml, eval=0.1), prep(chats(20), chatml, eval=0.1)
    assert not first.report.cached and second.report.cached and first.fingerprint == second.fingerprint
    assert isinstance(second.train.stores[0].ids, np.memmap) and second.train_rows == first.train_rows
    for i in range(len(first.train)):
        for one, other in zip(first.train.sample(i), second.train.sample(i), strict=True):
            assert one.tolist() == other.tolist()
    assert len(entries(tmp_path / "cache")) == 1
    report = second.report.to_dict()
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(first.report.to_dict() | {"cached": True}))


def test_what_needs_no_tokenizing_does_none(chatml: Any, prep: Prep) -> None:
    prep(chats(20), chatml)
    for change in ({"max_length": 64}, {"packing": False}, {"eval": 0.2}, {"seed": 3}, {"weight": 2.0}):
        assert prep(chats(20), chatml, **change).report.cached, change


def test_what_changes_tokens_is_tokenized_anew(chatml: Any, byte_level: Tokenizer, prep: Prep, tmp_path: Path) -> None:
    seen = {prep(chats(20), chatml).fingerprint}
    template = tmp_path / "my.jinja"
    template.write_text(kit.GENERATION)
    other = Tokenizer.from_str(byte_level.to_str())
    other.add_tokens(["Question"])
    for rows, tokenizer, data in (
        (chats(21), chatml, {}),
        (chats(20), wrap(byte_level, kit.THINK), {}),
        (chats(20), wrap(other, kit.CHATML), {}),
        (chats(20), chatml, {"chat_template": str(template)}),
        (chats(20), chatml, {"train_on": "all"}),
    ):
        prepared = prep(rows, tokenizer, **data)
        assert not prepared.report.cached and prepared.fingerprint not in seen
        seen.add(prepared.fingerprint)


def test_the_same_bytes_under_another_name_are_a_hit_and_an_edit_of_equal_size_is_not(
    chatml: Any, prep: Prep, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", chats(5))
    os.utime(path, (1_000_000, 1_000_000))  # old enough for its digest to be remembered
    assert not prep(str(path), chatml).report.cached
    copy = tmp_path / "two.jsonl"
    copy.write_bytes(path.read_bytes())
    assert prep(str(copy), chatml).report.cached
    path.write_text(path.read_text().replace("Answer 3.", "Answer 9."))
    assert not prep(str(path), chatml).report.cached


def test_the_digest_of_a_file_is_remembered(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    """Seen by what would go wrong: bytes changed behind an unchanged size and time are not read again."""
    path = write_jsonl(tmp_path / "one.jsonl", chats(5))
    os.utime(path, (1_000_000, 1_000_000))
    prep(str(path), chatml)
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"X")
    os.utime(path, (1_000_000, 1_000_000))
    assert prep(str(path), chatml).report.cached


@pytest.mark.parametrize("name", ["ids.bin", "mask.bin", "samples.bin", "meta.json"])
def test_a_damaged_entry_is_made_again(name: str, chatml: Any, prep: Prep, tmp_path: Path) -> None:
    expected = prep(chats(5), chatml).train.sample(4)[0].tolist()
    [entry] = entries(tmp_path / "cache")
    file = tmp_path / "cache" / entry / name
    file.write_bytes(file.read_bytes()[:-7])
    again = prep(chats(5), chatml)
    assert not again.report.cached and again.train.sample(4)[0].tolist() == expected
    assert entries(tmp_path / "cache") == [entry]


def _fill(writer: Writer) -> dict[str, Any]:
    writer.add(np.arange(5, dtype=np.int32), np.ones(5, np.uint8), row=1, place=0, keys=(1, 2))
    return {"layout": "text"}


@pytest.mark.parametrize(
    "number, says",
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot be written")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(number: int, says: str, tmp_path: Path) -> None:
    def fill(writer: Writer) -> dict[str, Any]:
        _fill(writer)
        raise OSError(number, os.strerror(number))

    with pytest.raises(DataError, match=says):
        build_store(tmp_path / "cache", "key", fill)
    assert not entries(tmp_path / "cache") and open_store(tmp_path / "cache", "key") is None


def test_a_cache_that_is_a_file(chatml: Any, prep: Prep, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match="the data cache cannot be written"):
        prep(chats(2), chatml)


def _rank(call: Callable[[], Prepared], start: Any, results: Any) -> None:
    start.wait(timeout=120)
    prepared = call()
    results.put((prepared.report.cached, prepared.fingerprint, prepared.train.sample(0)[0].tolist()))


def test_processes_at_once_do_the_work_once(
    chatml: Any, prep: Prep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the ranks are forked, and threads do not survive that
    path = str(write_jsonl(tmp_path / "rows.jsonl", chats(5000)))
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    call = partial(prep, path, chatml, eval=0.1)
    ranks = [context.Process(target=_rank, args=(call, start, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    cached, fingerprints, first = zip(*(results.get(timeout=180) for _ in ranks), strict=True)
    for rank in ranks:
        rank.join(timeout=120)
    assert sorted(cached) == [False, True, True]
    assert len(set(fingerprints)) == 1 and first[0] == first[1] == first[2]
    assert len(entries(tmp_path / "cache")) == 1


def test_a_killed_writer_leaves_no_entry_and_no_lock(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from trebuchet.training.data import Prepared
from trebuchet.training.data.store import build_store
def fill(writer):
    print("writing", flush=True)
    time.sleep(60)
build_store(Path(sys.argv[1]), "key", fill)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=120)
    assert open_store(tmp_path, "key") is None
    [left] = tmp_path.glob("key.tmp-*")
    os.utime(left, (time.time() - 100_000,) * 2)
    store, made = build_store(tmp_path, "key", _fill)
    assert made and len(store.samples) == 1  # the lock went with the process
    assert entries(tmp_path) == ["key"]  # and a day later what it had begun is removed
