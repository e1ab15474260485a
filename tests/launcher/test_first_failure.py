"""The words that close a run whose ranks ended without any, or only saw another go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from trebuchet.launcher import first_failure, worker
from trebuchet.launcher.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.log(0).write_text("step 7\n")
    folder.log(1).write_text("step 6\nstep 7\n")
    return folder


def failed(folder: RunFolder, rank: int, exit_code: int) -> None:
    folder.first_failure.write_text(json.dumps({"rank": rank, "exit_code": exit_code}))


def test_only_an_echo_is_replaced_and_only_by_a_signal(folder: RunFolder) -> None:
    echo = worker.describe(RuntimeError("[gloo] Read error: Connection reset by peer."))
    assert first_failure.named(folder, echo) == echo  # torchrun said nothing
    failed(folder, 1, 1)
    assert first_failure.named(folder, echo) == echo  # and rank 1 has a log with its own words
    failed(folder, 1, -9)
    words = first_failure.named(folder, echo)
    assert (
        words and words.startswith("rank 1 was ended by SIGKILL, as the kernel") and words.endswith("step 6 / step 7")
    )
    assert first_failure.named(folder, "out of memory: 2 GiB") == "out of memory: 2 GiB"
    assert first_failure.named(folder, None) is None


def test_without_a_word(folder: RunFolder) -> None:
    assert "(exit 1)" in first_failure.without_a_word(folder, 1)
    failed(folder, 1, -11)
    words = first_failure.without_a_word(folder, 1)
    assert "without a word; rank 1 was ended by SIGSEGV. Last" in words and words.endswith(
        "rank-1.log: step 6 / step 7"
    )
    folder.log(0).unlink()
    folder.log(1).unlink()
    assert first_failure.without_a_word(folder, 3).startswith("accelerate could not start the ranks (exit 3)")


def test_a_mistake_of_the_launcher_is_not_hidden(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit):
        first_failure.main(str(folder.root), "--no-such-word", "-m", "x")
    assert "usage" in capfd.readouterr().err
