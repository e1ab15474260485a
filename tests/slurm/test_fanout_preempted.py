"""A fanned-out call whose node is taken from it: done again, and waited for."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from trebuchet.slurm.fanout import fan_out, gather
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster, wait_for


@pytest.mark.slow
def test_a_preempted_call_is_done_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Without grace time: Slurm requeues the task, and calls it PREEMPTED before it waits again, which is not its end."""
    trace = tmp_path / "trace"

    def call(item: int) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit's handler would have it waited for, KillWait long
        with trace.open("a") as file:
            file.write("begun\n")
        begun = len(trace.read_text().splitlines())
        time.sleep(600 if begun == 1 else 0)
        return begun + item

    jobs = fan_out(
        call, [10], site=build_site({"partition": "abrupt", "time": "5"}, "test"), folder=tmp_path / "a", name="a"
    )
    wait_for(trace.exists, 180, "the call")
    slurm.ask("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    (row,) = gather(jobs)
    assert (row["result"], row["error"]) == (12, None)
