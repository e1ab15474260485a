"""Arrays on a real Slurm: one job, many items, one table."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from trebuchet.slurm.fanout import fan_out, gather, write_table
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster


@pytest.mark.slow
def test_one_array_and_one_table(slurm: SlurmCluster, tmp_path: Path) -> None:
    """math.sqrt of 12 numbers, one of them impossible: 11 results, one error, one job id, at most 4 at a time."""
    site = build_site({"partition": "low", "time": "5"}, "test")
    numbers = [float(i * i) for i in range(11)] + [-1.0]
    jobs = fan_out(math.sqrt, numbers, site=site, folder=tmp_path / "array", name="roots", parallel=4)
    assert len({job.job_id.partition("_")[0] for job in jobs}) == 1
    shown = slurm.ask("scontrol", "show", "job", jobs[0].job_id.partition("_")[0])
    assert "ArrayTaskThrottle=4" in shown and "JobName=roots" in shown
    rows = gather(jobs)
    assert [row["result"] for row in rows[:11]] == list(range(11))
    assert rows[11]["result"] is None and "ValueError" in rows[11]["error"]
    table = write_table(rows, tmp_path / "table.jsonl")
    assert [json.loads(line) for line in table.read_text().splitlines()] == rows


@pytest.mark.slow
def test_a_thousand_items_are_one_call(slurm: SlurmCluster, tmp_path: Path) -> None:
    site = build_site({"partition": "low", "time": "5", "extra": ["--hold"]}, "test")
    began = time.perf_counter()
    jobs = fan_out(math.sqrt, range(1000), site=site, folder=tmp_path, name="many")
    taken = time.perf_counter() - began
    slurm.ask("scancel", jobs[0].job_id.partition("_")[0])
    assert {job.job_id.partition("_")[0] for job in jobs} == {jobs[0].job_id.partition("_")[0]} and len(jobs) == 1000
    assert taken < 30, "one call takes well under a second on an idle machine"


def test_more_than_one_array_holds_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="one array holds 1 to 1000"):
        fan_out(math.sqrt, range(1001), site=build_site({}, "test"), folder=tmp_path, name="many")
