"""The surface of the command line and of the Python verbs: what exists, what it prints, and that a dry run leaves no trace."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trebuchet
import yaml
from trebuchet.launcher import api, cli, local
from trebuchet.launcher.config import build_config
from trebuchet.launcher.errors import JobFailed, NothingFits, SchedulerRefused, UserError

DEBUG = {"--debug", "--help"}
# Every verb with its options. A change here is a change for users: say so in the docs.
SURFACE = {
    "plan": {"CONFIG", "--set", "--json", "--cluster"},
    "run": {"CONFIG", "--set", "--dry-run"},
    "submit": {"CONFIG", "--set", "--json", "--cluster", "--dry-run"},
    "resume": {"RUN"},
    "status": {"RUN", "--json"},
    "logs": {"RUN", "--follow"},
    "cancel": {"RUN"},
    "list": {"FOLDER", "--json"},
}


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("verb", SURFACE)
def test_options_of_each_verb(verb: str) -> None:
    actions = verbs()[verb]._actions
    found = {next((o for o in a.option_strings if o.startswith("--")), str(a.metavar)) for a in actions}
    assert found - DEBUG >= SURFACE[verb]


def test_every_verb_that_acts_has_a_dry_run_in_both_spellings() -> None:
    for verb in ("run", "submit"):
        spellings = {o for action in verbs()[verb]._actions for o in action.option_strings}
        assert {"--dry-run", "--dryrun"} <= spellings


def test_exit_codes_are_those_of_the_error_tree() -> None:
    assert (JobFailed.exit_code, UserError.exit_code, NothingFits.exit_code, SchedulerRefused.exit_code) == (1, 2, 3, 4)


@pytest.mark.parametrize("verb", ["run", "submit"])
def test_a_dry_run_prints_the_plan_and_the_script_and_writes_nothing(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_config: Callable[..., dict[str, Any]],
) -> None:
    here = tmp_path / "it's here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny_config()))
    assert cli.main([verb, str(tmp_path / "t.yaml"), "--dryrun", "--set", "optimization.max_steps=7"]) == 0
    out = capsys.readouterr().out
    assert "> full none" in out and not list(here.iterdir())
    script = out[out.index("#!/bin/sh") :]
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    words = shlex.split(script.splitlines()[-1])
    assert words[-3:] == ["-m", "trebuchet.launcher.worker", str(here / "runs" / "t")]  # one word, whatever is in it
    assert str(here / "runs" / "t" / "accelerate.yaml") in words


def test_the_environment_of_ranks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert local.cpu_environment(2)["OMP_NUM_THREADS"] == "4"
    assert local.cpu_environment(16)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own wish
    assert local.cpu_environment(2)["OMP_NUM_THREADS"] == "3"


def test_the_verbs_from_python() -> None:
    assert {"plan", "run", "submit", "resume"} <= set(trebuchet.__all__)
    assert all(getattr(trebuchet, name) is getattr(api, name) for name in trebuchet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'launch'"):
        _ = trebuchet.launch  # type: ignore[attr-defined]


def test_plan_takes_a_path_a_mapping_and_a_config(tmp_path: Path) -> None:
    tree = {"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": "t.jsonl", "output": "runs/t"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    plans = [
        api.plan(c, cluster="rtx4090-1")
        for c in (tree, tmp_path / "t.yaml", str(tmp_path / "t.yaml"), build_config(tree))
    ]
    assert len({p.model_dump_json() for p in plans}) == 1
    changed = api.plan(build_config(tree), cluster="rtx4090-1", overrides=["strategy=lora"])
    assert changed.chosen and changed.chosen.method == "lora"


def test_estimate_answers_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (("{", "is not JSON"), ("{}", "must hold a list"), ('[{"model": 1}]', "request 0")):
        (tmp_path / "r.json").write_text(text)
        assert cli.main(["estimate", "--json", str(tmp_path / "r.json")]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "r.json").write_text("[]")
    assert cli.main(["estimate", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_schema_verb_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "data"]
