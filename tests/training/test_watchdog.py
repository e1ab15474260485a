"""The watchdog: who is blamed, and that a rank that sleeps in a step is found with its line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training import watchdog
from trebuchet.training.watchdog import Watchdog, blame


def words(rank: int, *, waiting: bool = True, step: int = 7) -> dict[str, object]:
    return {"rank": rank, "node": f"n{rank // 2}", "step": step, "waiting": waiting, "where": "data.py:3 in read"}


@pytest.mark.parametrize(
    ("found", "rank", "part"),
    [
        ([words(0), words(1), words(3)], 2, "Without a word: rank 2"),
        ([words(0), words(1), words(2), words(3, waiting=False)], 3, "Rank 3 on n1 is not waiting for others, but is at data.py:3"),
        ([words(0), words(1, step=6), words(2), words(3)], 1, "Rank 1 on n0 is behind: it is at data.py:3 in read, step 6"),
        ([words(0), words(1), words(2), words(3)], 0, "All ranks wait"),
    ],
)  # fmt: skip
def test_who_is_blamed(found: list[dict[str, object]], rank: int, part: str) -> None:
    answer = blame(found, 4)
    assert answer["rank"] == rank and part in answer["sentence"]


def test_a_rank_that_does_not_come_on_is_ended_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "GATHER_S", 0.01)
    folder, ended, codes = RunFolder(tmp_path), threading.Event(), []
    folder.logs.mkdir()
    dog = Watchdog(folder, 0, 1, 0.2, end=lambda code: (codes.append(code), ended.set()))
    dog.start(12)
    assert ended.wait(20)  # this thread is the one that does not come on
    outcome = json.loads(folder.outcome.read_text())
    assert codes == [1] and outcome["error"].startswith("hang: no step for 0.2 s after step 12. Rank 0 on ")
    assert "this rank is at" in capsys.readouterr().err


def test_beats_and_a_stop_keep_it_quiet(tmp_path: Path) -> None:
    folder, ended = RunFolder(tmp_path), threading.Event()
    folder.logs.mkdir()
    dog = Watchdog(folder, 0, 1, 0.4, end=lambda code: ended.set())
    dog.start(0)
    for step in range(8):
        dog.beat(step)
        assert not ended.wait(0.1)
    dog.stop()
    dog.thread.join(5)
    assert not ended.is_set() and not dog.thread.is_alive()


def test_the_limit_follows_the_speed_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREBUCHET_HANG_S", raising=False)
    large = {"optimization": {"global_batch_size": 1024}, "data": {"train": "t", "max_length": 8192}}
    base = {"model": "meta-llama/Llama-3.1-8B", "data": "t", "cluster": "a100-80gb-8"}
    slow, quick = (api.plan({**base, **sections}) for sections in (large, {}))
    assert slow.chosen and slow.chosen.time.tokens_per_s and quick.chosen
    step_s = 1024 * 8192 / slow.chosen.time.tokens_per_s
    # Loading: half an hour, and what reading 8.03e9 weights of two bytes takes at 20 MB/s.
    assert watchdog.loading_limit_s(slow) == pytest.approx(1800 + 2 * 8.03e9 / 20e6, rel=1e-3)
    assert watchdog.hang_limit_s(slow) == pytest.approx(20 * step_s) and step_s > 60
    assert watchdog.hang_limit_s(quick) == 900.0
    assert watchdog.collective_limit_s(slow) == 2 * watchdog.hang_limit_s(slow)
    monkeypatch.setenv("TREBUCHET_HANG_S", "7")
    assert watchdog.hang_limit_s(slow) == 7.0
    assert watchdog.collective_limit_s(slow) == watchdog.loading_limit_s(slow) + 60
    monkeypatch.setenv("TREBUCHET_LOADING_S", "5")
    assert watchdog.loading_limit_s(slow) == 5.0 and watchdog.collective_limit_s(slow) == 1800.0
