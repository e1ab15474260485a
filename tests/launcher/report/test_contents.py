"""Everything that a report promises stands in its page, with the numbers of plan and record. How it looks: test_pages.py."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs as made
from trebuchet.launcher import record
from trebuchet.launcher.report import collect, page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> collect.Run:
    """4 hours in two attempts on one GPU of 0.5 an hour, planned for other hours; of a model whose full fine-tuning does not fit."""
    plan = made.planned(1e-4, model="Qwen/Qwen2.5-7B-Instruct")
    folder = made.write(tmp_path_factory.mktemp("runs") / "one", plan)
    found = collect.read(folder)
    found.plan["cluster"]["groups"][0]["price_per_gpu_hour"] = 0.5
    found.plan["chosen"] |= {"cost": 1.23, "time": {"hours": 2.5, "tokens_per_s": 8765.0}}
    return found


@pytest.fixture(scope="module")
def text(run: collect.Run) -> str:
    return page.body([run])


def section(text: str, name: str) -> str:
    """The words of a section, without tags."""
    inside = text.split(f'<section id="{name}">')[1].split("</section>")[0]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", inside)).split())


def test_time_and_money_planned_and_spent(text: str) -> None:
    tiles = dict(re.findall(r'class="label">([^<]+)</span><strong>(.*?</span>)', text))
    assert tiles["time"] == '4.0 h</strong><span class="remark">2.5 h planned</span>'
    assert tiles["cost"] == '2.00</strong><span class="remark">1.23 planned</span>'
    assert "Dashed: 8,765 planned. MFU" in section(text, "training")


def test_every_rejected_option_with_its_reason(run: collect.Run, text: str) -> None:
    found = section(text, "plan")
    assert text.count('data-row="rejected"') == len(run.plan["rejected"]) > 0
    for one in run.plan["rejected"]:
        assert one["reason"] in found
    for reason in run.plan["reasons"]:
        assert reason in found


def test_restarts_are_on_the_axis_of_steps_and_on_that_of_time(run: collect.Run, text: str) -> None:
    [loss, *_] = [f for f in page.charts.of_run(run) if f.id == "loss"]
    assert [shape["x0"] for shape in loss.layout["shapes"]] == [30]  # half of sixty steps
    found = section(text, "training")
    assert "PREEMPTED 2026-01-05T08:00:00+0000 2026-01-05T10:30:00+0000 0 30 preempted" in found
    assert "SUCCEEDED 2026-01-05T11:00:00+0000 2026-01-05T12:30:00+0000 30 60" in found


def test_only_losses_of_language_modelling_have_a_unit(run: collect.Run) -> None:
    pairs = replace(run, plan=run.plan | {"config": run.config | {"objective": {"name": "dpo"}}})
    labels = []
    for runs in ([run], [pairs], [run, pairs], [pairs, pairs]):
        figures = page.charts.of_run(runs[0]) if len(runs) == 1 else page.compare.of_runs(runs)
        [chart] = [one for one in figures if one.id in ("loss", "curves")]
        labels.append(chart.layout["yaxis"]["title"]["text"])
    assert labels == ["loss (nats per token)", "loss (dpo)", "loss", "loss (dpo)"]


def test_counts_masks_kernels_samples_and_environment(run: collect.Run, text: str) -> None:
    data = section(text, "data")
    assert "900 samples, 250,000 tokens" in data and "60,000 tokens carry loss (24 %)" in data
    assert "130 rows, 97.0 % full; 3 cut, 0 dropped, 2 repeated" in data and "fingerprint ab12" in data
    kernels = section(text, "kernels")
    assert "LlamaRMSNorm rms_norm 48" in kernels and "Linear 1" in kernels and "triton" in kernels
    evaluation = section(text, "evaluation")
    assert all(word in evaluation for word in ("prompt", "base", "tuned answer alpha", "reference ref"))
    environment = section(text, "environment")
    for name, version in run.record["versions"].items():
        assert f"{name} {version}" in environment
    assert run.record["host"]["name"] in environment and "trebuchet run" in environment


def test_figures_that_choose_the_weights_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "one", made.planned(1e-4))
    assert not {"margin", "moved"} & {one.id for one in page.charts.of_run(collect.read(folder))}
    with folder.metrics.open("a") as file:
        for step, value in ((20, 0.25), (40, 0.5)):
            file.write(json.dumps({"step": step, "eval_loss": 1, "eval_margin": 2 * value, "kl_nats": value}) + "\n")
    run = collect.read(folder)
    charts = {one.id: one for one in page.charts.of_run(run)}
    assert charts["moved"].data[0]["y"] == [0.25, 0.5] and charts["margin"].data[0]["y"] == [0.5, 1.0]
    assert charts["margin"].data[0]["x"] == [20, 40] and 'id="plot-moved"' in page.body([run])


@pytest.mark.parametrize("given_back", [True, False])
def test_each_phase_of_memory_is_predicted_and_measured_and_says_what_it_is(tmp_path: Path, given_back: bool) -> None:
    folder = made.write(tmp_path / "one", made.planned(1e-4))
    measured = {"what": "resident", "by_phase": True, "given_back": given_back, "before_gib": 0.5}
    peaks = {"load": 1.1, "forward_backward": 8.9, "optimizer_step": 6.2, "checkpoint_save": 5.9}
    record.update(folder, measured_memory=measured | {"phases_gib": peaks})
    run = collect.read(folder)
    [chart] = [one for one in page.charts.of_run(run) if one.id == "phases"]
    allowance = run.chosen["memory"]["process_gib"] - run.chosen["memory"]["peak_allocated_gib"]
    for (label, predicted, seen, difference), name in zip(chart.rows, peaks, strict=True):
        wanted = run.chosen["memory"]["phases"][name] + allowance
        assert label.split()[0] == name.split("_")[0] and float(predicted) == pytest.approx(wanted, abs=5e-4)
        assert float(seen) == peaks[name]
        assert float(difference.strip("%")) == pytest.approx(100 * (wanted / peaks[name] - 1), abs=0.51)
    assert ("given back to the system" in chart.note) == given_back
    assert ("only the largest bar is a measurement" in chart.note) != given_back
