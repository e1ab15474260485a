"""States as sacct of a real slurmdbd prints them, long after the controller has forgotten the jobs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.errors import SchedulerRefused
from trebuchet.launcher.job_state import JobState
from trebuchet.slurm import states

from . import accounting, cluster
from .cluster import wait_for


@pytest.fixture
def accounted() -> Iterator[accounting.AccountedCluster]:
    missing = cluster.install() or cluster.install(accounting.PROGRAMS, accounting.PACKAGES)
    if missing is not None:
        pytest.skip(missing)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    with_sacct = accounting.AccountedCluster(root=root, nodes=1)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    states.configuration.cache_clear()
    try:
        with_sacct.start()
        yield with_sacct
    finally:
        with_sacct.stop()
        states.configuration.cache_clear()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.slow
def test_sacct_knows_what_the_controller_has_forgotten(accounted: accounting.AccountedCluster) -> None:
    """One of each kind, an array with tasks that wait among them; one question for all."""

    def submit(*options: str) -> str:
        return accounted.ask("sbatch", "--parsable", "--output=/dev/null", *options).strip()

    assert states.has_accounting()
    done, failed = submit("--wrap=true"), submit("--wrap=exit 3")
    memory = submit("--mem=100M", "--wrap=python3 -c 'import time; x = bytearray(300 * 2**20); time.sleep(30)'")
    taken = submit("--partition=low", "--no-requeue", "--exclusive", "--wrap=sleep 300")
    array = submit("--array=0-3%1", "--wrap=sleep 1")
    held = submit("--hold", "--array=0-1", "--wrap=true")
    waiting = {held + "_0": JobState.PENDING, held + "_1": JobState.PENDING}
    assert states.states(waiting) == waiting
    wait_for(lambda: states.states([taken]).get(taken) == JobState.RUNNING, 180, "the job that is to be cancelled")
    accounted.ask("scancel", taken)
    tasks = {f"{array}_{n}": JobState.SUCCEEDED for n in range(4)}
    wanted = {done: JobState.SUCCEEDED, failed: JobState.FAILED, taken: JobState.CANCELLED, **tasks}
    wait_for(lambda: states.states(wanted) == wanted, 120, lambda: f"{wanted}; {states.states(wanted)}")
    # Ended by Slurm for its memory: FAILED here, OUT_OF_MEMORY where a cgroup did it; never a success.
    wait_for(lambda: states.states([memory]).get(memory, JobState.PENDING).ended, 180, "the job out of memory")
    assert states.states([memory])[memory] in (JobState.OUT_OF_MEMORY, JobState.FAILED, JobState.CANCELLED)
    wait_for(lambda: accounted.state(done) == "", 180, "the controller to forget")
    assert states.states(wanted) == wanted and states.states(["999999"]) == {}


# `sacct --noheader --parsable2 --allocations --format=JobID,JobIDRaw,State` of Slurm 22.05.
PRINTED = """\
1|1|COMPLETED
2|2|FAILED
4|4|CANCELLED by 0
5_[1-2,4%1]|5|PENDING
5_0|6|RUNNING
5_3|7|NODE_FAIL
"""


def test_what_sacct_prints_is_read() -> None:
    found = states._by_id(PRINTED, ["1", "2", "4", "5_0", "5_2", "5_3", "5_4", "6", "9"])
    assert found == {
        "1": JobState.SUCCEEDED, "2": JobState.FAILED, "4": JobState.CANCELLED, "5_0": JobState.RUNNING,
        "5_2": JobState.PENDING, "5_3": JobState.NODE_FAIL, "5_4": JobState.PENDING,
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from(sorted(states.STATES)), st.sampled_from(["", "+", " by 0"])))
)
def test_any_state_of_any_job_is_read(rows: list[tuple[int, str, str]]) -> None:
    text = "".join(f"{job}|{job}|{word}{after}\n" for job, word, after in rows)
    last = {str(job): states.STATES[word] for job, word, _ in rows}
    assert states._by_id(text, [*last, "51"]) == last


def test_an_unknown_word_is_not_guessed() -> None:
    with pytest.raises(SchedulerRefused, match="HOVERING"):
        states.to_state("HOVERING")
