"""The record around an attempt, from what a node leaves behind. Facts and logs are files here; runs on Slurm are in test_runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import api, record
from trebuchet.launcher.job_state import JobState
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.slurm import attempt, scheduler

from .test_classify import facts

SRUN_FAILED = "srun: error: n2: task 1: Exited with exit code 1\n"


@pytest.fixture
def run(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> RunFolder:
    """A run of two nodes with two ranks each, submitted as far as its record goes."""
    cluster = tmp_path / "cluster.yaml"
    groups = [{"nodes": 2, "host_memory_gib": 16, "cores": 2}]
    cluster.write_text(yaml.safe_dump({"scheduler": "slurm", "groups": groups}), encoding="utf-8")
    changes = {"optimization.global_batch_size": 24, "optimization.micro_batch": 3}
    ranks = {"name": str(cluster), "processes": 2}
    folder, plan = api.begin(tiny_config(changes, output=str(tmp_path / "run"), cluster=ranks))
    assert plan.chosen is not None and (plan.chosen.ranks, plan.chosen.accumulation) == (4, 2)
    folder.logs.mkdir()
    record.update(folder, submitted="slurm://cluster/7")
    return folder


def begin(run: RunFolder, monkeypatch: pytest.MonkeyPatch, **known: str) -> int:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return attempt.begin(run, facts(**known))


def leave(run: RunFolder, exit_code: int, error: str | None, log: str = "", rank: int = 0) -> None:
    run.outcome.write_text(json.dumps({"exit_code": exit_code, "error": error, "rank": rank}))
    with (run.logs / "slurm.log").open("a") as file:
        file.write(log)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert begin(run, monkeypatch) == 0
    leave(run, 1, "out of memory: CUDA out of memory.", SRUN_FAILED, rank=1)
    assert attempt.end(run, facts(), 1, 60, 3) == "requeue"
    chosen = Plan.model_validate_json(run.plan.read_text()).chosen
    assert chosen is not None and chosen.micro_batch == 1 and chosen.accumulation * chosen.ranks == 24
    found = record.read(run)
    assert (found["state"], found["error"], found["attempts"][0]["state"]) == ("PENDING", None, "OUT_OF_MEMORY")
    assert "micro-batch 1 instead of 3" in found["attempts"][0]["reason"]
    said = []
    for order in ("requeue", "requeue", "exit 1"):  # micro-batch 1 does not fit either, nor with checkpointing
        begin(run, monkeypatch)
        leave(run, 1, "out of memory: CUDA out of memory. Choose qlora.", SRUN_FAILED)
        assert attempt.end(run, facts(), 1, 60, 3) == order
        said.append(record.read(run)["attempts"][-1]["reason"])
    assert "checkpointing selective instead of none" in said[0] and "full instead of selective" in said[1]
    found = record.read(run)
    assert (found["state"], found["exit_code"]) == ("OUT_OF_MEMORY", 1) and "qlora" in found["error"]


def test_a_failure_shows_the_last_lines_of_the_rank_that_failed_first(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, monkeypatch)
    run.log(0).write_text("the echo\n")
    run.log(1).write_text("loading\nthe cause\n")
    leave(run, 1, "ValueError: shapes differ", SRUN_FAILED + SRUN_FAILED.replace("n2: task 1", "n1: task 0"))
    assert attempt.end(run, facts(), 1, 60, 3) == "exit 1"
    found = record.read(run)
    assert found["state"] == "FAILED" and "ValueError: shapes differ" in found["error"]
    assert "rank-1.log: loading / the cause" in found["error"] and "echo" not in found["error"]


def test_an_older_attempt_does_not_speak_for_a_newer(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is appended to and outcome.json stays behind: neither may be read as the next attempt's."""
    begin(run, monkeypatch)
    leave(run, 1, "out of memory: CUDA", "slurmstepd: error: Detected 1 oom_kill event\n" + SRUN_FAILED)
    attempt.end(run, facts(), 1, 60, 3)
    begin(run, monkeypatch)
    assert not run.outcome.exists()
    assert attempt.end(run, facts(), 127, 60, 3) == "exit 127"
    assert "srun ended with 127" in record.read(run)["error"]


def test_avoided_nodes_add_up(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(run, monkeypatch)
    leave(run, 1, "NCCL error", "srun: error: n2: task 3: Killed\n")
    run.log(3).write_text("last words\n")
    many = facts(excluded="n9")
    assert attempt.end(run, many, 137, 60, 3) == "avoid n9,n2"
    last = record.read(run)["attempts"][0]
    assert last["state"] == "NODE_FAIL" and "Goes on without n2." in last["reason"] and "last words" in last["reason"]


@pytest.mark.parametrize(("n1", "state", "kind"), [("down*", "NODE_FAIL", "node"), ("idle", "PREEMPTED", "preempted")])
def test_an_attempt_without_an_end_is_closed_by_the_next(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, n1: str, state: str, kind: str
) -> None:
    begin(run, monkeypatch)
    (run.checkpoint(10)).mkdir(parents=True)
    (run.checkpoint(10) / "manifest.json").touch()
    (run.checkpoint(20)).mkdir()  # never sealed
    begin(run, monkeypatch, n1=n1)
    first, second = record.read(run)["attempts"]
    assert (first["state"], first["kind"]) == (state, kind) and first["ended"]
    assert second["state"] == "RUNNING" and second["first_step"] == 10


def test_no_reader_sees_an_end_that_is_none(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state that the record has while a job is on its way back to the queue; `logs -f` stops at one that is ended."""
    seen = []
    write = record.write_atomically

    def watch(path: Path, text: str) -> None:
        if path == run.record:
            seen.append(JobState(json.loads(text)["state"]))
        write(path, text)

    begin(run, monkeypatch)
    monkeypatch.setattr(record, "write_atomically", watch)
    leave(run, 1, "NCCL error", "srun: error: n2: task 3: Killed\n")
    assert attempt.end(run, facts(), 137, 60, 3).startswith("avoid")
    begin(run, monkeypatch)
    begin(run, monkeypatch)  # the one before left no word
    assert len(seen) >= 6 and not any(state.ended for state in seen)


def test_cancelled_while_it_waited(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stop.touch()
    assert begin(run, monkeypatch) == 130
    assert record.read(run)["state"] == "CANCELLED" and not run.stop.exists()


def test_the_warning_grows_with_the_measured_save(run: RunFolder) -> None:
    plan = Plan.model_validate_json(run.plan.read_text())
    assert scheduler.warning_s(plan, run) == 60
    record.update(run, save_s=200.0)
    assert scheduler.warning_s(plan, run) == 600
    assert "#SBATCH --signal=USR1@600\n" in scheduler.preview(plan, run)


def test_trackers_continue_the_same_run(run: RunFolder) -> None:
    plan = Plan.model_validate_json(run.plan.read_text())
    environment = scheduler.job_spec(plan, run).environment
    assert environment == scheduler.job_spec(plan, run).environment
    assert environment["WANDB_RESUME"] == "allow" and environment["WANDB_RUN_ID"].startswith("run-")


def test_what_runs_around_the_ranks_is_light() -> None:
    """Twice in every attempt, on the node: pydantic, yaml and email alone would be four tenths of a second of it."""
    code = (
        "import sys, trebuchet.slurm.attempt; print(sorted({'pydantic', 'yaml', 'email', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_trial_does_not_start_when_the_sweep_s_budget_is_used_up(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that ran for an hour before it; the budget holds two and then one."""
    for name in ("000", "001"):
        shutil.copytree(run.root, tmp_path / "sweep" / "trials" / name)
    first, second = (RunFolder(tmp_path / "sweep" / "trials" / name) for name in ("000", "001"))
    hour = {"started": "2026-01-01T10:00:00+0000", "ended": "2026-01-01T11:00:00+0000"}
    record.update(first, attempts=[hour])
    for hours, code, state in ((2, 0, "RUNNING"), (1, 130, "CANCELLED")):
        (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"budget": {"hours": hours}}))
        record.update(second, attempts=[])
        assert begin(second, monkeypatch) == code
        assert record.read(second)["state"] == state
    assert "budget.hours of 1 hours" in record.read(second)["error"] == record.read(second)["left_out"]
