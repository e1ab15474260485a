"""Runs of a tiny model on a real Slurm: to their end, through preemption, killed ranks and lost nodes, past the time limit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import api, cli, record
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import open_run
from trebuchet.slurm import states

from .cluster import SlurmCluster
from .conftest import HERE
from .running import finish, losses, rank_process, run_job, said, submit, wait_for_step

pytestmark = pytest.mark.slow
Config = Callable[..., dict[str, Any]]
TWO_NODES = {
    "optimization.max_steps": 120, "checkpointing.every": 15, "evaluation.every": 120, "evaluation.generations": 0,
    "data.packing": False, "data.max_length": 64,
}  # fmt: skip


def test_two_nodes_through_preemption_a_killed_rank_and_a_lost_node(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """Two nodes with a gloo rank each, disturbed three times: the losses of the undisturbed run, to the bit. (Two ranks a node cost twice
    as long to start; what each rank of several on a node is told: test_tasks.py.)"""
    cluster = cluster_file(nodes=2)
    ranks = {"name": cluster, "processes": 1}
    whole = submit(tiny_config(TWO_NODES, output=str(tmp_path / "whole"), cluster=ranks), cluster)
    lines = finish(whole)
    assert record.read(whole)["state"] == "SUCCEEDED", said(whole)
    assert {line[:4] for line in lines if line.startswith("[")} >= {"[0] "}
    expected = losses(whole)
    assert list(expected) == list(range(1, 121))

    run = submit(tiny_config(TWO_NODES, output=str(tmp_path / "disturbed"), cluster=ranks), cluster)
    wait_for_step(run, 5, attempt=1)
    slurm.ask("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for_step(run, 0, attempt=2)
    wait_for_step(run, record.read(run)["attempts"][1]["first_step"] + 17, attempt=2)  # with a checkpoint in between
    rank_process(run, 1).kill()
    wait_for_step(run, 0, attempt=3)
    wait_for_step(
        run, record.read(run)["attempts"][1]["last_step"] + 3, attempt=3
    )  # far from the end: done ranks are not missed
    lost = record.read(run)["attempts"][-1]["nodes"][-1]
    slurm.kill_node(lost)
    try:
        finish(run)
    finally:
        slurm.start_node(lost)
    found = record.read(run)
    assert found["state"] == "SUCCEEDED", said(run)
    first, second, third, fourth = found["attempts"]
    assert len({attempt["handle"] for attempt in found["attempts"]}) == 1  # one job id through all of it
    assert first["kind"] == "preempted" and first["state"] == "PREEMPTED" and "saved in time" in first["reason"]
    assert second["first_step"] == first["last_step"] >= 5  # nothing lost with a warning
    assert second["kind"] == "node" and "rank 1" in second["reason"] and "Killed" in second["reason"]
    assert third["first_step"] >= second["last_step"] - 15  # one checkpoint interval without
    assert second["nodes"][1] not in third["nodes"]  # the node of the killed rank is avoided
    assert third["kind"] == "node" and lost in third["reason"] and lost not in fourth["nodes"]
    assert fourth["first_step"] >= third["last_step"] - 15 and fourth["state"] == "SUCCEEDED"
    assert losses(run) == expected
    # Tokenized once where the job was handed in: no rank waits at a barrier for another that reads rows.
    assert record.read(whole)["data"]["cached"] and found["data"]["cached"]
    weights = [folder.model / "model.safetensors" for folder in (whole, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_time_limit_cancel_and_resume(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """A run without end: goes on after its time limit under the same id, stops when it is told to, is resumed as a new job."""
    changes = {"optimization.max_steps": 10**6, "checkpointing.every": 10**5, "evaluation.every": 10**5, "data.eval": 0}
    run = submit(
        tiny_config(changes, output=str(tmp_path / "run")), cluster_file(warning_s=200)
    )  # at once, whatever the limit: Slurm looks twice a minute
    wait_for_step(run, 2, attempt=1)
    job = record.read(run)["submitted"].rpartition("/")[2]
    minutes = slurm.ask("squeue", "-h", "-j", job, "-o", "%M").strip().split(":")[-2]
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 2}")  # Slurm counts limits in minutes
    wait_for_step(run, 0, attempt=2)
    wait_for_step(run, record.read(run)["attempts"][0]["last_step"] + 1, attempt=2)
    first, second = record.read(run)["attempts"]
    assert first["kind"] == "time-limit" and first["state"] == "TIMEOUT" and "saved in time" in first["reason"], said(
        run
    )
    assert second["first_step"] == first["last_step"] and second["handle"] == first["handle"]

    assert cli.main(["cancel", str(run.root)]) == 0
    assert any("stopped after step" in line for line in finish(run))
    found = record.read(run)
    assert (found["state"], found["exit_code"], len(found["attempts"])) == ("CANCELLED", 130, 2), said(run)
    slurm.wait_state(job, "COMPLETED", "FAILED")  # and it does not come back

    again = api.resume(str(run.root))
    assert again.handle != first["handle"]
    wait_for_step(run, found["step"] + 1, attempt=3)
    assert record.read(run)["attempts"][-1]["first_step"] == found["step"]
    slurm.ask("scancel", again.handle.rpartition("/")[2])
    slurm.wait_state(again.handle.rpartition("/")[2], "CANCELLED")
    assert api.current_state(run) == JobState.CANCELLED


def test_a_rank_that_hangs_is_named_and_the_job_goes_on_once(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    changes = {"optimization.max_steps": 10**6, "checkpointing.every": 10, "evaluation.every": 10**5, "data.eval": 0}
    cluster = cluster_file(environment={**HERE, "TREBUCHET_HANG_S": "5"})
    ranks = {"name": cluster, "processes": 2}
    run = submit(tiny_config(changes, output=str(tmp_path / "run"), cluster=ranks), cluster)
    wait_for_step(run, 12, attempt=1)
    rank_process(run, 1).suspend()
    wait_for_step(run, 0, attempt=2)
    first, second = record.read(run)["attempts"]
    assert first["kind"] == "hang" and "Without a word: rank 1" in first["reason"], said(run)
    assert second["first_step"] >= first["last_step"] - 10
    slurm.ask("scancel", run_job(run))


def test_hostile_folder_from_a_login_node_without_torch(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """Submitted by the command line where torch, transformers and datasets cannot be imported; the script is the dry run's."""
    folder = tmp_path / "a b'c\"$(touch pwned)`touch pwned`\n日本 %j \\ #"
    config = tiny_config({"optimization.max_steps": 2, "evaluation.generations": 0}, output=str(folder))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    bare = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'datasets', 'numpy')));"
        "from trebuchet.launcher import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", bare, "submit", "train.yaml", "--cluster", cluster_file()]
    environment = {**os.environ, "HF_TOKEN": "hf_secret", "WANDB_API_KEY": "secret2"}
    done = [
        subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for more in (["--dry-run"], [])
    ]
    assert [d.returncode for d in done] == [0, 0], done[-1].stderr
    assert "checked in the job's first minute" in done[1].stdout
    run = open_run(str(folder))
    script = run.script.read_text(encoding="utf-8")
    assert done[0].stdout.endswith("\n" + script) and "secret" not in script
    finish(run)
    found = record.read(run)
    assert found["state"] == "SUCCEEDED" and found["step"] == 2 and found["data"]["train"], said(run)
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    job = found["submitted"].rpartition("/")[2]
    assert "secret" not in slurm.ask("scontrol", "show", "job", job) + said(run)


def test_data_that_only_the_node_can_read_stop_the_job(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"nothing": "known"}\n' * 20)
    monkeypatch.setattr(api, "can_read_data", lambda: False)
    run = submit(tiny_config({"data.train": str(tmp_path / "bad.jsonl")}, output=str(tmp_path / "run")), cluster_file())
    finish(run)
    found = record.read(run)
    assert (found["state"], found["exit_code"], len(found["attempts"])) == ("FAILED", 2, 1), said(run)
    assert "bad.jsonl" in found["error"]


def test_waiting_jobs_and_refusals(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled in the queue; refused by sbatch; many states with one question."""
    real, asked = states.call, []

    def counted(*words: str, **options: Any) -> str:
        asked.append(words[0])
        return real(*words, **options)

    monkeypatch.setattr(states, "call", counted)
    runs = [
        submit(tiny_config(output=str(tmp_path / "runs" / str(i))), cluster_file(extra=["--hold"])) for i in range(3)
    ]
    assert {api.current_state(run) for run in runs} == {JobState.PENDING}
    assert cli.main(["cancel", str(runs[0].root)]) == 0 and "taken from the queue" in capsys.readouterr().out
    slurm.ask("scancel", record.read(runs[1])["submitted"].rpartition("/")[2])
    asked.clear()
    assert cli.main(["list", "--json", str(tmp_path / "runs")]) == 0
    assert asked.count("squeue") == 1, asked
    listed = {entry["run"]: entry["state"] for entry in json.loads(capsys.readouterr().out)}
    assert listed == {"0": "CANCELLED", "1": "CANCELLED", "2": "PENDING"}
    slurm.ask("scancel", record.read(runs[2])["submitted"].rpartition("/")[2])

    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny_config(output=str(tmp_path / "refused"))))
    assert cli.main(["submit", str(tmp_path / "t.yaml"), "--cluster", cluster_file(partition="nowhere")]) == 4
    assert "invalid partition" in capsys.readouterr().err
    found = record.read(open_run(str(tmp_path / "refused")))
    assert found["state"] == "FAILED" and "invalid partition" in found["error"]


def test_doctor_asks_the_nodes(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two nodes answer together; the folder of the job is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    cluster = cluster_file(nodes=2)
    assert cli.main(["doctor", "--cluster", cluster]) == 0
    said = capsys.readouterr().out
    assert "2 ranks met (n" in said and "GB/s" in said and "fit to train" in said
    assert not list(tmp_path.glob(".trebuchet-doctor-*"))


@pytest.fixture
def small_disk(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_the_run_and_says_so(
    small_disk: Path, cluster_file: Callable[..., str], tiny_config: Config
) -> None:
    changes = {"optimization.max_steps": 10**6, "checkpointing.every": 50, "evaluation.every": 10**5, "data.eval": 0}
    run = submit(tiny_config(changes, output=str(small_disk / "run")), cluster_file())
    wait_for_step(run, 55, attempt=1)
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    finish(run)
    found = record.read(run)
    assert (found["state"], len(found["attempts"])) == ("FAILED", 1), said(run)
    assert "no space left" in found["error"]
    assert (run.checkpoint(50) / "manifest.json").exists()  # what was saved before stays
