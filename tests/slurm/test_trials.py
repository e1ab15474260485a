"""Sweeps as arrays on a real Slurm: one call, one table, trials that are requeued and resumed like any run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli, record
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.sweep import SweepFolder, begin, open_sweep, plan_sweep, start
from trebuchet.slurm.trials import refuse_too_many

from .cluster import SlurmCluster, wait_for
from .running import rank_process, said, submissions

pytestmark = pytest.mark.slow
Config = Callable[..., dict[str, Any]]


def table(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", "--json", str(folder.root)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_sweep_is_one_array_and_one_table_and_resume_loses_nothing(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two at a time. The rank of the first is killed; it goes on by itself under its id and finishes. The second is cancelled as it runs,
    the third as it waits; resume starts those two alone. The dry run is what was submitted."""
    space = {"optimization.max_steps": {"choice": [14, 10**6, 3]}, "optimization.schedule": {"choice": ["constant"]}}
    few = {"checkpointing.every": 5, "evaluation.every": 10**5, "evaluation.generations": 0}
    config = tiny_config(few, output=str(tmp_path / "a sweep"))
    config["sweep"] = {"space": space, "method": "grid", "parallel": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--cluster", cluster_file(restarts=1)]
    assert cli.main([*command, "--dry-run"]) == 0
    shown, before = capsys.readouterr().out, submissions(slurm)
    assert not (tmp_path / "a sweep").exists() and "trial 001: optimization.max_steps=1000000" in shown
    assert cli.main(command) == 0
    assert submissions(slurm) - before == 1 and "3 trials are slurm://" in capsys.readouterr().out
    folder = open_sweep(str(tmp_path / "a sweep"))
    assert folder is not None and shown.endswith("\n" + folder.script.read_text(encoding="utf-8"))

    first, second, third = folder.trials()
    slurm.ask("scontrol", "hold", job_of(third))  # or it starts while the first waits to go on
    wait_for(lambda: record.read(first)["step"] >= 6, 150, lambda: said(first))
    rank_process(first, 0).kill()
    wait_for(lambda: record.read(second)["step"] >= 2, 150, lambda: said(second))
    wait_for(lambda: record.read(first)["state"] == "SUCCEEDED", 150, lambda: said(first))
    model = (first.model / "model.safetensors").stat()
    assert cli.main(["cancel", str(folder.root)]) == 0
    assert "1 trials were waiting and are taken from the queue, 1 save" in capsys.readouterr().out
    wait_for(lambda: table(folder, capsys)["counts"] == {"SUCCEEDED": 1, "CANCELLED": 2}, 180, lambda: said(second))

    before = submissions(slurm)
    assert cli.main(["resume", str(folder.root)]) == 0
    assert "2 trials are slurm://" in capsys.readouterr().out and submissions(slurm) - before == 1
    assert "#SBATCH --array=1-2%2\n" in folder.script.read_text(encoding="utf-8")
    stopped = record.read(second)["attempts"][0]["last_step"]
    wait_for(
        lambda: len(record.read(second)["attempts"]) == 2 and record.read(second)["step"] > stopped,
        150,
        lambda: said(second),
    )
    assert cli.main(["cancel", str(second.root)]) == 0  # a trial is a run like any other
    wait_for(lambda: table(folder, capsys)["counts"] == {"SUCCEEDED": 2, "CANCELLED": 1}, 150, lambda: said(third))
    assert (first.model / "model.safetensors").stat() == model  # not run again

    found = table(folder, capsys)
    rows = {row["trial"]: row for row in found["trials"]}
    assert [len(rows[name]["attempts"]) for name in ("000", "001", "002")] == [2, 2, 1], found
    assert "Killed" in rows["000"]["attempts"][0]
    handles = {a["handle"] for a in record.read(first)["attempts"]}
    assert len(handles) == 1 and handles.pop().endswith("_0")
    values = [rows[name]["value"] for name in ("000", "002")]
    assert found["best"] == ("000" if values[0] < values[1] else "002") == found["trials"][0]["trial"]
    assert rows["002"]["value"] == record.read(third)["evaluation"]["after"]["loss"]
    # One set of tokenized data for all.
    assert len({json.dumps(record.read(trial)["data"]["fingerprint"]) for trial in folder.trials()}) == 1


def job_of(trial: RunFolder) -> str:
    return str(record.read(trial)["submitted"]).rpartition("/")[2]


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
