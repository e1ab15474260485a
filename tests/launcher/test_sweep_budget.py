"""Budgets of sweeps, their table as it changes, and one sweep on this machine that runs out, is given more and ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher import cli, record, sweep_budget, sweep_follow
from trebuchet.launcher.sweep import SweepFolder, give

Config = Callable[..., dict[str, Any]]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=12))
def test_time_that_trials_share_counts_once(found: list[tuple[int, int]]) -> None:
    """Against the whole seconds that lie in any span, counted one by one."""
    spans = [(begin, begin + length) for begin, length in found]
    seconds = {second for begin, end in spans for second in range(begin, end)}
    assert sweep_budget.union_s(spans) == len(seconds)


def a_sweep(root: Path, budget: dict[str, float], attempts: list[list[tuple[str, str | None]]]) -> Path:
    """Only what a budget is reckoned from: two GPUs a trial at 3 an hour each."""
    for number, spans in enumerate(attempts):
        trial = root / "trials" / f"{number:03d}"
        trial.mkdir(parents=True)
        plan = {"chosen": {"gpus": 2}, "cluster": {"groups": [{"price_per_gpu_hour": 3.0}]}}
        (trial / "plan.json").write_text(json.dumps(plan))
        rows = [{"started": f"2026-01-01T{b}:00+0000", "ended": e and f"2026-01-01T{e}:00+0000"} for b, e in spans]
        (trial / "run.json").write_text(json.dumps({"state": "PENDING", "attempts": rows}))
    (root / "sweep.json").write_text(json.dumps({"budget": budget}))
    return root


def test_hours_and_price_by_hand(tmp_path: Path) -> None:
    """10:00 to 11:30 and 11:00 to 12:00 are 2 hours in which trials ran, and 2.5 hours of two GPUs: 15."""
    attempts: list[list[tuple[str, str | None]]] = [[("10:00", "11:00"), ("11:00", "11:30")], [("11:00", "12:00")], []]
    root = a_sweep(tmp_path / "a", {"hours": 2.5, "price": 16}, attempts)
    found = sweep_budget.spent(root)
    assert found.hours == pytest.approx(2) and found.price == pytest.approx(15) and sweep_budget.used_up(root) is None
    (root / "sweep.json").write_text(json.dumps({"budget": {"price": 15}}))
    assert sweep_budget.used_up(root) == "sweep.budget.price of 15 is used up"
    (root / "sweep.json").write_text(json.dumps({"budget": {"hours": 2}}))
    why = sweep_budget.used_up(root)
    assert why is not None and "hours of 2" in why
    sweep_budget.end_sweep(root, why)
    assert (root / "stop").exists()
    assert all(record.read(trial)["state"] == "CANCELLED" for trial in sweep_budget.trials(root))
    assert sweep_budget.sweep_of(sweep_budget.trials(root)[0]) == root


def test_a_table_is_drawn_over_itself_on_a_terminal_only() -> None:
    before, after = ["a", "b", "c"], ["a", "B", "c", "d"]
    assert sweep_follow.drawn(before, after, over=False) == "B\nd\n"
    assert sweep_follow.drawn(before, after, over=True) == "\x1b[3F\x1b[Ja\nB\nc\nd\n"
    assert sweep_follow.drawn([], before, over=True) == "a\nb\nc\n"


@pytest.mark.slow
def test_a_search_runs_out_of_its_budget_and_goes_on_with_more(
    tiny_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two trials. After two steps of the first nothing is left of the budget: it saves, and with more goes on from there. The values of
    the second trial are drawn when it starts, and not before."""
    pytest.importorskip("optuna", reason="searches need optuna: pip install 'trebuchet[sweep]'")
    few = {
        "evaluation.every": 10**6,
        "evaluation.generations": 0,
        "checkpointing.every": 10**6,
        "optimization.max_steps": 200,
    }
    config = tiny_config(few, output=str(tmp_path / "sweep"))
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"log_uniform": [1e-5, 1e-3]}},
        "method": "optuna",
        "trials": 2,
        "budget": {"hours": 100},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    folder = SweepFolder(tmp_path / "sweep")

    def take_away() -> None:
        while not folder.record.exists() or record.read(folder.trial(0))["step"] < 2:
            time.sleep(0.1)
        give(folder, ["sweep.budget.hours=1e-6"])

    thread = threading.Thread(target=take_away)
    thread.start()
    assert cli.main(["sweep", str(tmp_path / "s.yaml")]) == 1
    thread.join()
    first, second = map(record.read, folder.trials())
    assert (first["state"], second["state"]) == ("CANCELLED", "CANCELLED") and not second["attempts"]
    assert (
        "sweep.budget.hours" in first["left_out"]
        and (folder.trial(0).checkpoint(first["step"]) / "manifest.json").exists()
    )
    assert folder.facts()["trials"][0] and folder.facts()["trials"][1] is None
    capfd.readouterr()
    assert cli.main(["resume", str(folder.root)]) == 2 and "is used up; give more" in capfd.readouterr().err
    assert cli.main(["resume", str(folder.root), "--set", "sweep.trials=9"]) == 2
    assert "only sweep.budget" in capfd.readouterr().err

    assert cli.main(["resume", str(folder.root), "--set", "sweep.budget.hours=5"]) == 0
    shown = capfd.readouterr().out
    assert "used:" in shown and "of 5 hours" in shown and "best so far: trial 00" in shown
    attempts = record.read(folder.trial(0))["attempts"]
    assert [a["first_step"] for a in attempts] == [0, first["step"]] and 2 <= first["step"] < 200
    drawn = folder.facts()["trials"][1]["optimization.learning_rate"]
    assert json.loads(folder.trial(1).plan.read_text())["chosen"]["learning_rate"] == drawn
    page = (folder.root / "report.html").read_text()
    best = folder.trial(0 if "trial 000" in shown.split("best so far")[1] else 1)
    assert str(best.model) in shown and str(best.model) in page
    steps = sorted(int(p.parent.name.removeprefix("step-")) for p in best.checkpoints.glob("step-*/manifest.json"))
    assert steps and f"checkpoint: {best.checkpoint(steps[-1])}\n" in shown
    assert '"id": "results"' in page and "optimization.learning_rate" in page
