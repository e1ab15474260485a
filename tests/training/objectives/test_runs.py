"""Whole runs: preferences that are learnt show on held-out pairs, in metrics.jsonl, in the record and in the closing table."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api, cli, record, worker
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.run_text import comparison

from ...conftest import WORDS, write_jsonl

ROOT = Path(__file__).resolve().parents[3]


def taste(count: int, start: int = 0, *, single: bool = False) -> list[dict[str, Any]]:
    """Answers that go north are preferred to those that go to the stone, whatever was asked."""
    rows = []
    for i in range(start, start + count):
        prompt, rest = f"{i} {WORDS[i % 8]} {WORDS[i * 3 % 7]}:", f" {WORDS[i * 5 % 8]} {i}"
        good, bad = f" north{rest}", f" stone{rest}"
        row = {"prompt": prompt, "chosen": good, "rejected": bad}
        rows.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)} if single else row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "method", "best"),
    [
        ("dpo", "lora", "accuracy"),
        ("kto", "full", "loss"),
        ("reward", "lora", "margin"),
        ("orpo", "full", "last"),
    ],
)
def test_a_run_raises_the_held_out_accuracy_and_eval_says_the_same(
    tiny_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    method: str,
    best: str,
) -> None:
    changes = {
        "data.train": str(write_jsonl(tmp_path / "train.jsonl", taste(60, single=objective == "kto"))),
        "data.eval": str(write_jsonl(tmp_path / "eval.jsonl", taste(20, 100, single=objective == "kto"))),
        "objective": objective, "strategy.method": method, "optimization.learning_rate": 3e-3,
        "optimization.global_batch_size": 4, "optimization.max_steps": 40, "evaluation.every": 20, "evaluation.generations": 1,
        "tracking": [], "evaluation.best": best,
    }  # fmt: skip
    folder, plan = api.begin(tiny_config(changes, output=str(tmp_path / "run")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    found = record.read(folder)["evaluation"]
    before, after = found["before"], found["after"]
    assert after["accuracy"] >= 0.9 and after["margin"] > before["margin"] and after["loss"] < before["loss"]
    if objective in ("dpo", "kto"):  # nothing has moved yet, and a tie counts half
        assert before["accuracy"] == pytest.approx(0.5, abs=1e-6) and before["margin"] == pytest.approx(0, abs=1e-5)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert all({"loss", "accuracy", "margin"} <= line.keys() for line in lines if "loss" in line)
    measured = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in measured] == [20, 40]
    chosen = 1
    if best != "last":
        values = [line[f"eval_{best}"] for line in measured]
        chosen = values.index(min(values) if best == "loss" else max(values))
        assert record.read(folder)["best"]["step"] == measured[chosen]["step"]
    assert measured[chosen]["eval_accuracy"] == after["accuracy"]
    # A score head may happen to prefer every chosen side before it has learnt anything; then only its margin can grow.
    best_already = before["accuracy"] >= 0.9
    assert found["verdict"] == ("not distinguishable" if best_already else "better")
    assert objective == "kto" or found["compared"]["margin"]["verdict"] == "better"
    _asked_again(folder)
    table = "\n".join(comparison(json.loads(folder.evaluation.read_text())))
    assert f"{before['accuracy']:.1%}" in table and f"{after['accuracy']:.1%}" in table and "margin" in table
    if objective == "reward":
        _opens_as_a_classifier(folder.model, plan.model.path)
        assert cli.main(["merge", str(folder.root)]) == 2
        assert "comes with a score head" in capsys.readouterr().err


def _asked_again(folder: RunFolder) -> None:
    """`trebuchet eval` opens both models with transformers and PEFT, without the kernel layer, and computes its own reference."""
    was = json.loads(folder.evaluation.read_text())
    assert cli.main(["eval", str(folder.root)]) == 0
    now = json.loads(folder.evaluation.read_text())
    for when in ("before", "after"):
        assert now[when]["rows"]["sample"] == was[when]["rows"]["sample"]
        assert now[when]["rows"]["accuracy"] == was[when]["rows"]["accuracy"]
        mine, theirs = now[when]["rows"].get("margin", [0]), was[when]["rows"].get("margin", [0])
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)  # fp32 sums in another order, through two layers
        assert now[when]["accuracy"] == pytest.approx(sum(now[when]["rows"]["accuracy"]) / 20)
    assert now["verdict"] == was["verdict"] and now["compared"]["accuracy"]["rows"] == 20


def _opens_as_a_classifier(folder: Path, base: str | None) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    loaded = PeftModel.from_pretrained(net, folder)
    weight = loaded.base_model.model.score.modules_to_save["default"].weight
    assert weight.shape == (1, 64) and float(weight.abs().sum()) > 0


@pytest.mark.slow
def test_the_example_makes_rows_of_both_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "docstring_preferences.py"))
    script["main"](tmp_path)
    assert "pairs-train.jsonl" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "pairs-train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 500
    for row in rows[:50]:
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen != rejected and sorted(chosen.split()) == sorted(rejected.split())
    labels = [json.loads(line)["label"] for line in (tmp_path / "judged-train.jsonl").read_text().splitlines()]
    assert abs(sum(labels) - len(labels) / 2) <= 1
    held = {
        json.loads(line)["prompt"][0]["content"] for line in (tmp_path / "pairs-heldout.jsonl").read_text().splitlines()
    }
    assert held and not held & {row["prompt"][0]["content"] for row in rows}
