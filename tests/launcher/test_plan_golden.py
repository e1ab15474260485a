"""Whole plans, byte for byte, as people and machines read them; and what is said when nothing fits.

pytest tests/launcher/test_plan_golden.py --rewrite-golden      writes the files anew; read the difference before you commit it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.cli import main
from trebuchet.launcher.plan_text import limit, render
from trebuchet.launcher.planner import make_plan

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "8b-a100x8": ("meta-llama/Llama-3.1-8B", "a100-80gb-8", []),
    "70b-a100x16": ("meta-llama/Llama-3.1-70B", "a100-80gb-16", ["optimization.max_steps=1000"]),
    "70b-2x24gb": ("meta-llama/Llama-3.1-70B", "rtx4090-2x24gb", []),
    "405b-2x24gb": ("meta-llama/Llama-3.1-405B", "rtx4090-2x24gb", []),
    "7b-t4": ("mistralai/Mistral-7B-v0.1", "t4-1", ["strategy.lora.r=128", "data.eval=0", "optimization.epochs=8"]),
}


@pytest.mark.parametrize("name", CASES)
def test_plans_are_those_of_the_golden_files(name: str, request: pytest.FixtureRequest) -> None:
    model, cluster, overrides = CASES[name]
    plan = api.plan({"model": model, "data": "train.jsonl"}, cluster=cluster, overrides=overrides)
    found = {"txt": render(plan), "json": json.dumps(plan.public(), indent=1) + "\n"}
    for suffix, text in found.items():
        file = GOLDEN / f"{name}.{suffix}"
        if request.config.getoption("--rewrite-golden"):
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"{file} is missing; write it with --rewrite-golden"
        assert file.read_text(encoding="utf-8") == text


def test_a_plan_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets and dicts of strings have another order under another hash seed; a plan does not."""
    config = tmp_path / "train.yaml"
    config.write_text("model: meta-llama/Llama-3.1-405B\ndata: train.jsonl\n")
    command = [
        sys.executable,
        "-m",
        "trebuchet.launcher.cli",
        "plan",
        str(config),
        "--cluster",
        "rtx4090-2x24gb",
        "--json",
    ]
    seeds = [
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert [done.returncode for done in seeds] == [3, 3]
    assert seeds[0].stdout == seeds[1].stdout and json.loads(seeds[0].stdout)["nearest"]


@pytest.mark.parametrize(
    ("model", "cluster", "overrides", "change"),
    [
        ("meta-llama/Llama-3.1-8B", "rtx4090-1", ["strategy.method=full"], "strategy.method"),
        ("meta-llama/Llama-3.1-8B", "rtx4090-1", ["optimization.micro_batch=64"], "optimization.micro_batch"),
        (
            "meta-llama/Llama-3.1-8B",
            "rtx4090-1",
            ["data.max_length=131072", "strategy.offload=none"],
            "data.max_length",
        ),
        ("meta-llama/Llama-3.1-405B", "t4-1", [], "model.name"),
    ],
)
def test_the_nearest_thing_fits_when_it_is_asked_for(
    model: str, cluster: str, overrides: list[str], change: str
) -> None:
    source = {"model": model, "data": "train.jsonl"}
    plan = api.plan(source, cluster=cluster, overrides=overrides)
    assert not plan.feasible and plan.nearest is not None and change in plan.nearest.set
    changes = [f"{key}={value}" for key, value in plan.nearest.set.items()]
    again = api.plan(source, cluster=cluster, overrides=[*overrides, *changes])
    assert again.chosen is not None
    assert (again.chosen.method, again.chosen.parallel) == (plan.nearest.method, plan.nearest.parallel)


def test_the_smallest_cluster_holds_it_and_no_smaller_one_does() -> None:
    from trebuchet.launcher import way_out

    plan = api.plan({"model": "meta-llama/Llama-3.1-405B", "data": "t.jsonl"}, cluster="rtx4090-2x24gb")
    smallest = plan.smallest_cluster
    assert smallest is not None
    sizes = {cluster.name: way_out._memory_gib(cluster) for cluster in way_out.shapes()}
    for cluster in way_out.shapes():
        if sizes[cluster.name] < sizes[smallest.cluster]:
            assert not make_plan(plan.config, plan.model, cluster).feasible


def test_exit_code_and_words_when_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: meta-llama/Llama-3.1-405B\ndata: train.jsonl\n")
    assert main(["plan", str(config), "--cluster", "rtx4090-2x24gb"]) == 3
    shown = capsys.readouterr().out
    assert "Nothing fits." in shown and "nearest that fits:" in shown and "smallest cluster:" in shown


def test_time_limits() -> None:
    """A fifth more and ten minutes, in quarters of an hour, as sbatch takes them."""
    assert [limit(h) for h in (0.0, 1.0, 10.0, 30.0)] == ["00:15:00", "01:30:00", "12:15:00", "1-12:15:00"]
