"""Parts of the work made apart give the bytes that one process makes; sets larger than memory need little of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher.errors import DataError
from trebuchet.launcher.schema import Data, Objective
from trebuchet.launcher.schema_curate import Curate
from trebuchet.training.data import Prepared, prepare, prepare_part
from trebuchet.training.data import samples as samples_module
from trebuchet.training.data.curate import Maker, together
from trebuchet.training.data.curate.sheet import open_sheet
from trebuchet.training.data.samples import Samples
from trebuchet.training.data.tables import open_table

from .kit import chat, write_jsonl
from .test_duplicates import corpus


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "BLOCK", 7)


def section(folder: Path, **more: Any) -> Data:
    texts = corpus(60)
    rows = [chat(f"Question {i}?", text) for i, text in enumerate([*texts, *texts[:5]])]
    rows.insert(10, {"messages": []})
    train = write_jsonl(folder / "a.jsonl", rows)
    other = write_jsonl(folder / "b.jsonl", [chat(f"Other {i}?", text) for i, text in enumerate(corpus(20, seed=1))])
    general = write_jsonl(folder / "general.jsonl", [chat(f"G {i}?", text) for i, text in enumerate(corpus(9, seed=2))])
    held = write_jsonl(folder / "held.jsonl", [chat("Held?", texts[3])])
    sources = [{"path": str(train)}, {"path": str(other)}]
    more = {"curate": True, "skip_bad_rows": True, "max_length": 4096, "general": {"path": str(general)}} | more
    return Data.model_validate({"train": sources, "eval": [{"path": str(held)}]} | more)


def whole(data: Data, tokenizer: Any, cache: Path) -> Prepared:
    return prepare(
        data, Objective(), tokenizer=tokenizer, tokenizer_id="tiny", model_max_length=None, cache_dir=cache, seed=0
    )


def content(cache: Path) -> dict[str, bytes]:
    """Every file of every entry, paths inside the cache's own records apart."""
    files = [file for file in sorted(cache.rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(cache)): file.read_bytes() for file in files if file.parent.name != "files"}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shards, order", [(1, [0]), (3, [2, 0, 1]), (5, [0, 1, 2, 3, 4])])
def test_shards_put_together_are_what_one_process_makes(
    shards: int, order: list[int], chatml: Any, tmp_path: Path
) -> None:
    data = section(tmp_path)
    alone = whole(data, chatml, tmp_path / "alone")
    made = 0
    for shard in order:
        made += prepare_part(
            data, Objective(), tokenizer=chatml, tokenizer_id="tiny", cache_dir=tmp_path / "parts", shards=shards, shard=shard
        )  # fmt: skip
    assert made >= 2 * (10 + 3)  # blocks of 7 rows of both training sources, their tokens and their sheets
    together = whole(data, chatml, tmp_path / "parts")
    assert together.fingerprint == alone.fingerprint and together.train_rows == alone.train_rows
    assert content(tmp_path / "parts") == content(tmp_path / "alone")
    assert together.report.sources[0].bad == ("line 11: messages is an empty list",)


@pytest.mark.usefixtures("small_blocks")
def test_a_missing_or_damaged_part_is_made_at_the_end(chatml: Any, tmp_path: Path) -> None:
    data = section(tmp_path)
    alone = whole(data, chatml, tmp_path / "alone")
    prepare_part(
        data, Objective(), tokenizer=chatml, tokenizer_id="tiny", cache_dir=tmp_path / "parts", shards=2, shard=1
    )
    damaged = next(file for file in (tmp_path / "parts").rglob("ids.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert whole(data, chatml, tmp_path / "parts").fingerprint == alone.fingerprint
    left = content(tmp_path / "parts")
    assert left == content(tmp_path / "alone")


@pytest.mark.usefixtures("small_blocks")
def test_bad_rows_in_parts_are_refused_together(chatml: Any, tmp_path: Path) -> None:
    data = section(tmp_path, skip_bad_rows=False)
    for shard in (0, 1):
        prepare_part(
            data, Objective(), tokenizer=chatml, tokenizer_id="tiny", cache_dir=tmp_path / "parts", shards=2, shard=shard
        )  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl, line 11: messages is an empty list. It is the only bad row of 66"):
        whole(data, chatml, tmp_path / "parts")


def sheets(folder: Path, cache: str, **curated: Any) -> tuple[Maker, Samples, str]:
    source = section(folder).train[0]
    samples = Samples(open_table(source), source, kind="sft", roles=("assistant",))
    maker = Maker(Curate(**curated), skip_bad_rows=True, cache=folder / cache)
    return maker, samples, samples.table.digest(folder / cache / "files")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.slow
def test_processes_of_one_machine_share_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """66 rows in blocks of 7: this process makes the even ones, a child the odd ones, and together they are what one makes. A child
    that is killed costs time."""
    alone, samples, digest = sheets(tmp_path, "alone")
    alone.sheet(samples, digest, filtered=True)
    monkeypatch.setattr(together, "LARGE_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    maker, samples, digest = sheets(tmp_path, "both")
    together.blocks(maker, samples, digest, filtered=True)
    key = maker.key(samples, digest, True)
    assert all(open_sheet(maker.cache / f"{key}-{number}") for number in range(10))
    maker.sheet(samples, digest, filtered=True)
    assert content(tmp_path / "both") == content(tmp_path / "alone")

    code = tmp_path / "mine.py"
    code.write_text(
        f"import os\n\ndef keep(row):\n    return os.getpid() == {os.getpid()} or os.kill(os.getpid(), 9)\n"
    )
    maker, samples, digest = sheets(tmp_path, "killed", function=f"{code}:keep")
    together.blocks(maker, samples, digest, filtered=True)
    assert "process 1 of 2 ended with -9; its rows are read here" in capsys.readouterr().err
    key = maker.key(samples, digest, True)
    assert [open_sheet(maker.cache / f"{key}-{number}") is not None for number in range(4)] == [
        True,
        False,
        True,
        False,
    ]
    sheet, _ = maker.sheet(samples, digest, filtered=True)
    assert len(sheet.rows) == 65


PROGRAM = """
import json, resource, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from trebuchet.launcher.schema import Data, Objective
from trebuchet.training.data import prepare, prepare_part
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
data = Data.model_validate(json.loads(sys.argv[3]))
known = dict(tokenizer=tokenizer, tokenizer_id="tiny", cache_dir=Path(sys.argv[1]))
if len(sys.argv) > 4:
    print("started", flush=True)
    prepare_part(data, Objective(), shards=1, shard=0, **known)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepared = prepare(data, Objective(), model_max_length=None, seed=0, **known)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"fingerprint": prepared.fingerprint, "cached": prepared.report.cached, "mib": (after - before) / 1024,
                  "tokens": prepared.report.train.tokens}))
"""


def start(cache: Path, tokenizer: Any, data: Data, folder: Path, *more: str) -> subprocess.Popen[str]:
    tokenizer.save_pretrained(folder / "tokenizer")
    words = [str(cache), str(folder / "tokenizer"), data.model_dump_json(), *more]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_writer_killed_beside_another_leaves_the_right_entries(chatml: Any, tmp_path: Path) -> None:
    """Three processes on one cache, one of them killed while it works: the others end with the bytes that one alone makes."""
    data = section(tmp_path)
    alone = whole(data, chatml, tmp_path / "alone")
    victim = start(tmp_path / "cache", chatml, data, tmp_path, "part")
    assert victim.stdout is not None and victim.stdout.readline() == "started\n"
    others = [start(tmp_path / "cache", chatml, data, tmp_path) for _ in range(2)]
    victim.send_signal(signal.SIGKILL)
    victim.wait(timeout=180)
    found = [json.loads(other.communicate(timeout=120)[0]) for other in others]
    assert {result["fingerprint"] for result in found} == {alone.fingerprint}
    whole_entries = {name: value for name, value in content(tmp_path / "cache").items() if ".tmp-" not in name}
    expected = content(tmp_path / "alone")
    assert {name: whole_entries[name] for name in expected} == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(chatml: Any, tmp_path: Path) -> None:
    """Five times the rows, whole chunks in both: the peak grows by less than three times the text that was added. Kept in memory, the
    encodings alone would take twenty times the text."""
    texts, grown = corpus(200), []
    for count in (2000, 10_000):
        file = write_jsonl(tmp_path / f"{count}.jsonl", (chat(f"{i}?", texts[i % 200]) for i in range(count)))
        data = Data.model_validate({"train": [{"path": str(file)}], "eval": 0.01, "max_length": 4096})
        done = start(tmp_path / f"cache-{count}", chatml, data, tmp_path).communicate(timeout=1200)[0]
        grown.append((file.stat().st_size / 2**20, json.loads(done)["mib"]))
    (small, first), (large, second) = grown
    assert second - first < 3 * (large - small), grown
