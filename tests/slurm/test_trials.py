"""Sweeps as arrays on a real Slurm: one call, one table, trials that are requeued and resumed like any run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli, record
from trebuchet.launcher.sweep import SweepFolder, begin, open_sweep, plan_sweep, start
from trebuchet.slurm.trials import refuse_too_many

from .cluster import SlurmCluster, wait_for
from .running import rank_process, said

pytestmark = pytest.mark.slow
Config = Callable[..., dict[str, Any]]


def submissions(slurm: SlurmCluster) -> int:
    """REQUEST_SUBMIT_BATCH_JOB messages that the controller has had."""
    hit = re.search(r"REQUEST_SUBMIT_BATCH_JOB\s+\(\s*\d+\)\s+count:(\d+)", slurm.ask("sdiag"))
    return int(hit[1]) if hit else 0


def table(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", "--json", str(folder.root)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_sweep_is_one_array_and_one_table(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two trials. The rank of one is killed and goes on by itself under its id; the dry run is what was submitted."""
    space = {"optimization.learning_rate": {"choice": [1e-3, 1e-2]}}
    few = {"optimization.max_steps": 14, "checkpointing.every": 5, "evaluation.every": 14, "evaluation.generations": 0}
    config = tiny_config(few, output=str(tmp_path / "a sweep"))
    config["sweep"] = {"space": space, "method": "grid", "parallel": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--cluster", cluster_file(restarts=1)]
    assert cli.main([*command, "--dry-run"]) == 0
    shown, before = capsys.readouterr().out, submissions(slurm)
    assert not (tmp_path / "a sweep").exists() and "trial 001: optimization.learning_rate=0.01" in shown
    assert cli.main(command) == 0
    assert submissions(slurm) - before == 1 and "2 trials are slurm://" in capsys.readouterr().out
    folder = open_sweep(str(tmp_path / "a sweep"))
    assert folder is not None and shown.endswith("\n" + folder.script.read_text(encoding="utf-8"))

    first = folder.trial(0)
    wait_for(lambda: record.read(first)["step"] >= 6, 150, lambda: said(first))
    rank_process(first, 0).kill()
    wait_for(
        lambda: table(folder, capsys)["state"] not in ("PENDING", "RUNNING"),
        300,
        lambda: "\n".join(map(said, folder.trials())),
    )
    found = table(folder, capsys)
    rows = {row["trial"]: row for row in found["trials"]}
    assert [len(row["attempts"]) for row in (rows["000"], rows["001"])] == [2, 1], found
    assert rows["000"]["state"] == rows["001"]["state"] == "SUCCEEDED" and "Killed" in rows["000"]["attempts"][0]
    handles = {a["handle"] for a in record.read(first)["attempts"]}
    assert len(handles) == 1 and handles.pop().endswith("_0")
    values = [rows[name]["value"] for name in ("000", "001")]
    assert found["best"] == ("000" if values[0] < values[1] else "001") == found["trials"][0]["trial"]
    evaluated = record.read(folder.trial(1))["evaluation"]["after"]["loss"]
    assert rows["001"]["value"] == evaluated
    # One set of tokenized data for both.
    assert len({json.dumps(record.read(trial)["data"]["fingerprint"]) for trial in folder.trials()}) == 1


def test_cancel_and_resume_lose_no_finished_trial(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One at a time: the first finishes, the second is cancelled as it runs, the third as it waits; resume starts those two alone."""
    space = {"optimization.max_steps": {"choice": [2, 10**6, 3]}}
    few = {"checkpointing.every": 1000, "evaluation.every": 10**5, "evaluation.generations": 0}
    config = tiny_config(few, output=str(tmp_path / "sweep"))
    config["sweep"] = {"space": space, "method": "grid", "parallel": 1}
    folder = begin(plan_sweep(config, cluster=cluster_file()))
    start(folder, range(3))
    wait_for(lambda: record.read(folder.trial(1))["step"] >= 2, 150, lambda: said(folder.trial(1)))
    model = (folder.trial(0).model / "model.safetensors").stat()
    assert cli.main(["cancel", str(folder.root)]) == 0
    assert "1 trials were waiting and are taken from the queue, 1 save" in capsys.readouterr().out
    wait_for(
        lambda: table(folder, capsys)["counts"] == {"SUCCEEDED": 1, "CANCELLED": 2}, 60, lambda: said(folder.trial(1))
    )

    before = submissions(slurm)
    assert cli.main(["resume", str(folder.root)]) == 0
    assert "2 trials are slurm://" in capsys.readouterr().out and submissions(slurm) - before == 1
    assert "#SBATCH --array=1-2%1\n" in folder.script.read_text(encoding="utf-8")
    wait_for(
        lambda: len(record.read(folder.trial(1))["attempts"]) == 2 and record.read(folder.trial(1))["step"] > 2,
        150,
        lambda: said(folder.trial(1)),
    )
    assert cli.main(["cancel", str(folder.trial(1).root)]) == 0  # a trial is a run like any other
    wait_for(
        lambda: table(folder, capsys)["counts"] == {"SUCCEEDED": 2, "CANCELLED": 1}, 150, lambda: said(folder.trial(2))
    )
    assert (folder.trial(0).model / "model.safetensors").stat() == model


def test_a_thousand_trials_are_one_call(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(output=str(tmp_path / "many"))
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        "trials": 1000,
        "parallel": 20,
    }
    folder = begin(plan_sweep(config, cluster=cluster_file(extra=["--hold"])))
    before = submissions(slurm)
    start(folder, range(1000))
    array = record.read(folder.trial(0))["submitted"].rpartition("/")[2].partition("_")[0]
    assert submissions(slurm) - before == 1
    held = slurm.ask("scontrol", "show", "job", array)
    assert "ArrayTaskId=0-999%20" in held and "ArrayTaskThrottle=20" in held
    assert table(folder, capsys)["counts"] == {"PENDING": 1000}
    assert cli.main(["cancel", str(folder.root)]) == 0
    assert table(folder, capsys)["counts"] == {"CANCELLED": 1000}
    with pytest.raises(Exception, match="MaxArraySize"):
        refuse_too_many(2001)
