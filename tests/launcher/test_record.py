"""The record of a run: one writer at a time, states that outlive the processes which should have closed them."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api, cli, local, logs, record, watching, worker
from trebuchet.launcher.errors import RunError
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import RunFolder, new_run
from trebuchet.launcher.run_text import block, status

HERE = f"local://{platform.node()}/"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.logs.mkdir(parents=True)
    record.create(made, run="run", command=["trebuchet"], seed=0, model={"name": "m"}, data=None)
    return made


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_updates_of_many_writers_are_all_kept(folder: RunFolder) -> None:
    def write(name: str) -> None:
        for i in range(20):
            record.update(folder, **{f"{name}{i}": i})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = record.read(folder)
    assert all(found[f"{name}{i}"] == i for name in "abc" for i in range(20))
    assert not list(folder.root.glob(".run.json*"))


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    record.write_atomically(file, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        record.write_atomically(file, "new")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_a_living_launcher_or_living_ranks_keep_a_run_running(folder: RunFolder, dead: int) -> None:
    record.begin_attempt(folder, HERE + str(os.getpid()), ranks=dead)
    assert api.current_state(folder) == JobState.RUNNING  # between the end of the ranks and the closing of the record
    record.begin_attempt(folder, HERE + str(dead), ranks=os.getpid())
    assert api.current_state(folder) == JobState.RUNNING  # the launcher was killed, the ranks train on
    assert cli.main(["resume", str(folder.root)]) == 2
    record.begin_attempt(folder, "local://another-machine/1", ranks=dead)
    assert api.current_state(folder) == JobState.RUNNING  # not to be known from here


def test_a_run_without_processes_is_closed_by_what_its_ranks_left(folder: RunFolder, dead: int) -> None:
    for outcome, state, code in (
        (None, JobState.FAILED, 1),
        ({"exit_code": 0, "error": None}, JobState.SUCCEEDED, 0),
        ({"exit_code": worker.STOPPED, "error": None}, JobState.CANCELLED, 130),
        ({"exit_code": 1, "error": "out of memory: 3 GiB"}, JobState.OUT_OF_MEMORY, 1),
        ({"exit_code": 2, "error": "a bad row"}, JobState.FAILED, 2),
    ):
        folder.outcome.unlink(missing_ok=True)
        if outcome:
            folder.outcome.write_text(json.dumps(outcome))
        record.begin_attempt(folder, HERE + str(dead), ranks=dead)
        assert api.current_state(folder) == state
        found = record.read(folder)
        assert (found["exit_code"], found["attempts"][-1]["state"]) == (code, state) and found["attempts"][-1]["ended"]


def test_a_process_id_that_was_given_away_is_not_the_run(folder: RunFolder) -> None:
    """After a restart of the machine the number may belong to anything; it is younger than the attempt."""
    record.begin_attempt(folder, HERE + str(os.getpid()), ranks=os.getpid())
    record.update(folder, attempt={"started": "2020-01-01T00:00:00+0000"})
    assert api.current_state(folder) == JobState.FAILED


def test_a_submission_whose_watcher_died_is_not_pending_for_ever(folder: RunFolder, dead: int) -> None:
    assert api.current_state(folder) == JobState.PENDING
    record.update(folder, submitted=HERE + str(os.getpid()))
    assert api.current_state(folder) == JobState.PENDING
    record.update(folder, submitted=HERE + str(dead))
    assert api.current_state(folder) == JobState.FAILED
    assert "launcher.log" in record.read(folder)["error"]


def test_the_first_error_is_the_cause(folder: RunFolder) -> None:
    worker.write_outcome(folder, {"exit_code": 1, "error": "the cause", "rank": 1})
    worker.write_outcome(folder, {"exit_code": 1, "error": "its echo", "rank": 0})
    assert json.loads(folder.outcome.read_text())["error"] == "the cause"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: .*micro_batch"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device", "/x/step-3"), "no space left on the device that holds /x/step-3"),
        (
            ValueError("Some does not support an attention implementation through sdpa yet. Please"),
            "Some .* Set model.attention to eager",
        ),
        (RuntimeError("[gloo] Read error: Connection reset by peer."), "another rank ended"),
        (KeyError("token_loss\nmore"), "KeyError: "),
    ],
)
def test_failures_with_a_known_way_out_are_told_with_it(problem: Exception, words: str) -> None:
    text = worker.describe(problem)
    assert re.match(words, text) and "\n" not in text


def test_a_folder_is_taken_only_once(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds another run"):
        new_run(str(folder.root))
    (tmp_path / "empty").mkdir()
    assert new_run(str(tmp_path / "empty")).root == tmp_path / "empty"


def test_logs_follow_until_the_run_has_ended(folder: RunFolder, dead: int) -> None:
    """Lines that come while following are shown, tagged by rank, and a half line when the run ends."""
    folder.log(0).write_text("first\n")
    folder.log(1).write_text("other\n")
    record.begin_attempt(folder, HERE + str(os.getpid()), ranks=dead)
    seen: list[str] = []
    reading = threading.Thread(target=lambda: seen.extend(logs.lines(folder, follow=True)))
    reading.start()
    with folder.log(0).open("a") as log:
        log.write("second\nlast without an end")
    record.end_attempt(folder, JobState.SUCCEEDED, 0, None)
    reading.join(timeout=120)
    assert [line for line in seen if line.startswith("[0]")] == ["[0] first", "[0] second", "[0] last without an end"]
    assert len(seen) == 4 and "[1] other" in seen


def test_status_tells_each_attempt(folder: RunFolder, dead: int) -> None:
    record.begin_attempt(folder, HERE + str(dead), ranks=dead)
    record.update(folder, step=7, steps=20)
    facts = record.end_attempt(folder, JobState.FAILED, 1, "the reason")
    folder.metrics.write_text(
        json.dumps({"step": 7, "loss": 1.5, "tokens_per_s": 1234.5, "peak_memory_bytes": 2**30}) + '\n{"st'
    )
    text = status(folder, facts)
    assert "FAILED  step 7 of 20" in text and "loss 1.500, 1,234 tokens/s, peak memory 1.0 GiB" in text
    assert f"attempt 1: {HERE}{dead}  FAILED  from step 0 to 7: the reason" in text


def test_long_answers_are_cut_with_a_count() -> None:
    lines = block("tuned", "\n".join(str(i) for i in range(40)), most=5)
    assert len(lines) == 5 and lines[0] == "  tuned     | 0" and lines[-1].endswith("… (36 more lines)")


def test_a_controller_is_asked_ever_more_rarely(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of `logs -f` of a job of Slurm, on a clock that does not wait; the end stands in the record and is seen at once."""
    record.update(folder, submitted="slurm://there/1", state=JobState.RUNNING.value)
    now, asked = 0.0, []

    class Clock:
        def monotonic(self) -> float:
            return now

        def sleep(self, seconds: float) -> None:
            nonlocal now
            now += seconds
            if now >= 600:
                record.update(folder, state=JobState.SUCCEEDED.value)

    def state(run: RunFolder) -> JobState:
        asked.append(now)
        return JobState.RUNNING

    monkeypatch.setattr(logs, "time", Clock())
    monkeypatch.setattr(api, "current_state", state)
    assert list(logs.lines(folder, follow=True)) == [] and now < 601
    waits = [after - before for before, after in itertools.pairwise(asked)]
    assert waits[0] < 1 and waits[-1] == pytest.approx(30, abs=logs.POLL_S) and len(asked) < 40
    assert all(later >= earlier - 2 * logs.POLL_S for earlier, later in itertools.pairwise(waits))


def test_two_interrupts_end_the_ranks_at_once(folder: RunFolder) -> None:
    """The first is a wish; the second ends a rank that does not listen."""
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    process: Any = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    interrupts = watching.Interrupts(folder, process)
    with interrupts:
        os.kill(os.getpid(), 2)
        while not interrupts.asked:
            time.sleep(0.001)
        assert folder.stop.exists() and process.poll() is None
        os.kill(os.getpid(), 2)
        assert process.wait(timeout=120) == -9
    assert interrupts.ended
    record.begin_attempt(folder, HERE + "1", ranks=process.pid)
    assert local.close(folder, "without a word", ended_by_user=True) == 130
    assert record.read(folder)["state"] == "CANCELLED" and not folder.stop.exists()


@pytest.mark.parametrize(("parallel", "found"), [("none", False), ("ddp", False), ("fsdp2", False), ("zero3", True)])
def test_a_rank_looks_for_deepspeed_only_where_it_uses_it(parallel: str, found: bool) -> None:
    """In a process of its own, as a rank is: what a library asks that may use DeepSpeed where there is one."""
    if find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    asked = (
        f"from trebuchet.launcher import worker; worker.leave_out({parallel!r}); from importlib.util import find_spec; "
    )
    done = subprocess.run(
        [sys.executable, "-c", asked + "print(find_spec('deepspeed') is not None)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(found), done.stderr
