"""Sweeps on this machine: real trials one after the other, their table, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli, record
from trebuchet.launcher.sweep import SweepFolder, begin, open_sweep, plan_sweep

Config = Callable[..., dict[str, Any]]
FEW = {"evaluation.every": 100, "evaluation.generations": 0, "checkpointing.every": 100}


def write(path: Path, config: dict[str, Any], space: dict[str, Any], **sweep: Any) -> str:
    config["sweep"] = {"space": space, **sweep}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def list_of(folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one line of `trebuchet list`."""
    assert cli.main(["list", "--json", str(folder)]) == 0
    (entry,) = json.loads(capfd.readouterr().out)
    return dict(entry)


@pytest.mark.slow
def test_trials_run_one_after_the_other_and_resume_keeps_the_finished(
    tiny_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The data of the second are spoilt between planning and start: it fails alone. With the data back `resume` runs it alone."""
    rows = tmp_path / "rows.jsonl"
    config = tiny_config(FEW | {"optimization.max_steps": 2}, output=str(tmp_path / "sweep"))
    rows.write_bytes(Path(config["data"]["train"]).read_bytes())
    space = {"data.train": {"choice": [config["data"]["train"], str(rows)]}, "optimization.seed": {"choice": [3]}}
    planned = plan_sweep(config | {"sweep": {"space": space, "method": "grid"}})
    folder = begin(planned)
    kept = rows.read_bytes()
    rows.write_bytes(b"not the rows that were planned on\n")
    assert cli.main(["resume", str(folder.root)]) == 1  # nothing has run yet: both are started
    shown = capfd.readouterr().out
    assert "FAILED" in shown and "SUCCEEDED" in shown
    assert cli.main(["status", "--json", str(folder.root)]) == 0
    found = json.loads(capfd.readouterr().out)
    states = {row["trial"]: row["state"] for row in found["trials"]}
    assert states == {"000": "SUCCEEDED", "001": "FAILED"} and found["best"] == "000"
    assert record.read(folder.trial(0))["evaluation"]["after"]["loss"] == found["trials"][0]["value"]
    assert record.read(folder.trial(0))["seed"] == 3
    listed = list_of(tmp_path, capfd)
    assert (listed["state"], listed["step"], listed["steps"]) == ("FAILED", 1, 2)
    assert listed["loss_after"] == found["trials"][0]["value"] and listed["seed"] == 3

    rows.write_bytes(kept)
    model = (folder.trial(0).model / "model.safetensors").stat()
    assert cli.main(["resume", str(folder.root)]) == 0
    assert "1 SUCCEEDED" in capfd.readouterr().out
    assert (folder.trial(0).model / "model.safetensors").stat() == model
    assert len(record.read(folder.trial(1))["attempts"]) == 2
    assert (list_of(tmp_path, capfd)["state"], list_of(tmp_path, capfd)["step"]) == ("SUCCEEDED", 2)
    assert cli.main(["resume", str(folder.root)]) == 2 and "nothing to resume" in capfd.readouterr().err


def test_a_dry_run_writes_nothing(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"optimization.learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    file = write(tmp_path / "s.yaml", tiny_config(output=str(tmp_path / "sweep")), space, trials=3)
    assert cli.main(["sweep", file, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("trial 00") >= 3 and "accelerate" in shown and not (tmp_path / "sweep").exists()


def test_trials_are_runs_like_any_other(tiny_config: Config, tmp_path: Path) -> None:
    """Nothing is left of the sweep in a trial's own files; one set of tokenized data serves all."""
    config = tiny_config(output=str(tmp_path / "sweep"))
    space = {"optimization.learning_rate": {"uniform": [0.1, 0.2]}, "strategy.lora.r": {"choice": [4, 8]}}
    folder = begin(plan_sweep(config | {"sweep": {"space": space, "trials": 4, "metric": "loss", "mode": "max"}}))
    assert open_sweep(str(folder.root)) == folder == SweepFolder(tmp_path / "sweep")
    fingerprints = set()
    for number, values in enumerate(folder.facts()["trials"]):
        trial = folder.trial(number)
        written = yaml.safe_load(trial.config.read_text(encoding="utf-8"))
        assert written["sweep"] is None and written["output"] == str(trial.root)
        assert written["optimization"]["learning_rate"] == values["optimization.learning_rate"]
        assert json.loads(trial.plan.read_text())["chosen"]["learning_rate"] == values["optimization.learning_rate"]
        fingerprints.add(record.read(trial)["data"]["fingerprint"])
    assert len(fingerprints) == 1 and len(list((tmp_path / "sweep" / "trials").iterdir())) == 4


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"optimization.learning_rat": {"choice": [1e-3]}}, "did you mean 'learning_rate'"),
        ({"optimization.learning_rate": {"choice": [1e-3, 7]}}, "trial 001: optimization.learning_rate"),
        ({"model.name.x": {"choice": [1]}}, "'name' is a value, not a section"),
        ({"optimization.seed": {"choise": [1]}}, "choise"),
    ],
)
def test_a_wrong_space_is_said_before_anything_is_written(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], space: dict[str, Any], words: str
) -> None:
    file = write(tmp_path / "s.yaml", tiny_config(output=str(tmp_path / "sweep")), space, method="grid")
    assert cli.main(["sweep", file]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_other_verbs_say_what_a_sweep_is(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"optimization.seed": {"choice": [0, 1]}}
    file = write(tmp_path / "s.yaml", tiny_config(output=str(tmp_path / "sweep")), space, method="grid")
    assert cli.main(["run", file]) == 2 and "trebuchet sweep" in capsys.readouterr().err
    begin(plan_sweep(file))
    assert cli.main(["list", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[:4] == ["sweep", "PENDING", "0/2", "trials"]
    assert cli.main(["list", "--cost", str(tmp_path), "--where", "state=PENDING"]) == 0
    assert "sweep" in capsys.readouterr().out
    assert cli.main(["logs", str(tmp_path / "sweep")]) == 2 and "name one of its trials" in capsys.readouterr().err
    assert cli.main(["sweep", file]) == 2 and "not an empty folder" in capsys.readouterr().err
