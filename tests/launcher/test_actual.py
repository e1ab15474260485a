"""Plan against actual: what the first steps of a run say of its hours, its price and its time limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trebuchet.launcher import actual, api, record
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.run_text import status


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Plan]:
    folder = RunFolder(tmp_path / "r")
    folder.root.mkdir()
    config = {"model": "meta-llama/Llama-3.1-8B", "data": "t.jsonl", "optimization": {"max_steps": 1000}}
    plan = api.plan(config, cluster="a100-80gb-8")
    folder.plan.write_text(plan.model_dump_json())
    record.create(folder)
    record.update(folder, step=30, steps=1000, state="RUNNING")
    return folder, plan


def metrics(folder: RunFolder, seconds: list[float], first: int = 1) -> None:
    rows = [
        {"step": i, "loss": 2.0, "tokens": 32768, "tokens_per_s": 1.0, "step_s": s, "peak_memory_bytes": 2**30}
        for i, s in enumerate(seconds, first)
    ]
    with folder.metrics.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_twenty_steps_replace_the_plan(run: tuple[RunFolder, Plan]) -> None:
    """Two slow ones to warm up, eighteen of 4 s, then slower ones that count no more."""
    folder, plan = run
    metrics(folder, [60.0, 30.0, *[4.0] * 18, *[9.0] * 10])
    found = actual.actual(folder, plan, 1000)
    assert found is not None and plan.chosen is not None
    assert found.steps == 20 and found.hours == pytest.approx(1000 * 4 / 3600)
    assert found.tokens_per_s == pytest.approx(32768 / 4)
    assert found.price == pytest.approx(found.hours * 8 * 5.12)  # the cluster file's price
    assert (found.planned_hours, found.planned_price) == (plan.chosen.time.hours, plan.chosen.cost)
    assert found.time_limit == "01:30:00"  # 1.11 h and a fifth and ten minutes, in quarters
    page = status(folder, record.read(folder))
    assert "after 20 steps:" in page and "(planned" in page and "--time 01:30:00" in page


def test_one_bad_step_and_a_repeated_one_change_little(run: tuple[RunFolder, Plan]) -> None:
    """A run that went back to a checkpoint writes a step twice; the later one counts."""
    folder, plan = run
    metrics(folder, [60.0, 30.0, *[4.0] * 5, 400.0])
    metrics(folder, [4.0] * 12, first=8)
    found = actual.actual(folder, plan, 1000)
    assert found is not None and found.hours == pytest.approx(1000 * 4 / 3600) and found.steps == 19


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_steps_say_nothing(run: tuple[RunFolder, Plan], count: int) -> None:
    folder, plan = run
    metrics(folder, [4.0] * count)
    assert actual.actual(folder, plan, 1000) is None
    assert "planned" not in status(folder, record.read(folder))


def test_half_a_line_at_the_end_is_a_step_not_yet_written(run: tuple[RunFolder, Plan]) -> None:
    folder, plan = run
    metrics(folder, [4.0] * 5)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "loss"')
    assert actual.actual(folder, plan, 1000) is not None
