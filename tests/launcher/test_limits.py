"""What moves the planner off the method of highest fidelity: few examples, and a budget of hours or money."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.cli import main
from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.data_size import data_size
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.plan_text import render
from trebuchet.launcher.planner import make_plan

EIGHT_B, HALF_B = "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B-Instruct"
TOKENS = 300_000_000


def plan(name: str, cluster: str, examples: int | None = None, tokens: int | None = None, **sections: Any) -> Plan:
    config = build_config({"model": name, "data": "train.jsonl", **sections})
    return make_plan(config, load_model_spec(config.model), load_cluster(cluster), examples=examples, tokens=tokens)


@pytest.mark.parametrize(
    ("name", "examples", "strategy", "method"),
    [
        (EIGHT_B, 499, "auto", "lora"),
        (EIGHT_B, 500, "auto", "full"),
        (EIGHT_B, None, "auto", "full"),
        (EIGHT_B, 30, "full", "full"),  # the user's word
        (HALF_B, 30, "auto", "full"),
    ],
)
def test_few_examples_of_a_large_model_go_to_adapters(
    name: str, examples: int | None, strategy: str, method: str
) -> None:
    found = plan(name, "a100-80gb-8", examples, strategy=strategy)
    assert found.chosen is not None and found.chosen.method == method
    assert any("499 examples for 8.0 B parameters" in reason for reason in found.reasons) == (examples == 499)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"}\n', 2),
        ("a.json", '[{"text": "x"}, {"text": "y"}, {"text": "z"}]', 3),
        ("a.csv", 'prompt,completion\na,"two\nlines"\nb,c\n', 2),
        ("a.json", '{"rows": 3}', None),
        ("a.json", "[", None),
        ("a.parquet", "PAR1", None),
    ],
)
def test_rows_are_counted_where_that_is_cheap(name: str, text: str, rows: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    config = build_config({"model": EIGHT_B, "data": {"train": {"path": str(tmp_path / name), "weight": 1.0}}})
    assert data_size(config).examples == rows


def test_few_examples_put_full_last_and_do_not_rule_it_out() -> None:
    found = plan(EIGHT_B, "t4-1", 30, strategy={"checkpointing": "none"}, optimization={"micro_batch": 64})
    methods = [one.method for one in found.rejected]
    assert not found.feasible and "full" in methods and methods.index("qlora") < methods.index("full")


def test_hours_and_price_are_kept_or_the_next_method_is_taken() -> None:
    free = plan(EIGHT_B, "a100-80gb-8", 10_000, TOKENS).chosen
    assert free is not None and free.method == "full" and free.time.hours and free.cost
    lora = plan(EIGHT_B, "a100-80gb-8", 10_000, TOKENS, strategy="lora").chosen
    assert lora is not None and lora.time.hours and lora.cost and lora.time.hours < free.time.hours
    between = (lora.time.hours + free.time.hours) / 2
    found = plan(EIGHT_B, "a100-80gb-8", 10_000, TOKENS, budget={"hours": between})
    assert found.chosen is not None and found.chosen.method == "lora" and found.chosen.time.hours <= between
    no = next(r for r in found.rejected if r.method == "full" and "budget" in r.reason)
    assert f"{free.time.hours:,.1f} h needed, budget.hours is {between:g}" in no.reason and no.needed_gib is None
    assert "budget.hours is" in " ".join(render(found).split())
    enough = plan(EIGHT_B, "a100-80gb-8", 10_000, TOKENS, budget={"hours": free.time.hours, "cost": free.cost})
    assert enough.chosen is not None and enough.chosen.method == "full"
    assert any(f"budget.cost {free.cost:g}: {free.cost:,.2f} planned" in reason for reason in enough.reasons)
    dear = plan(EIGHT_B, "a100-80gb-8", 10_000, TOKENS, budget={"cost": (lora.cost + free.cost) / 2})
    assert dear.chosen is not None and dear.chosen.method == "lora"


def test_a_budget_that_nothing_keeps_is_exit_3_and_the_way_out_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 2000}) + "\n" for _ in range(600)))
    config = tmp_path / "train.yaml"
    config.write_text(f"model: {EIGHT_B}\ndata: {rows}\ncluster: rtx4090-1\nbudget: {{hours: 0.01}}\n")
    assert main(["plan", str(config), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["nearest"]["set"] == {"budget.hours": "null"}
    assert any("budget.hours is 0.01" in r["reason"] for r in found["rejected"])
    freed = api.plan(str(config), overrides=["budget.hours=null"])
    assert freed.chosen is not None and freed.chosen.method == found["nearest"]["method"]


def test_hours_that_are_not_known_are_said_to_be_so() -> None:
    found = plan(EIGHT_B, "a100-80gb-8", budget={"hours": 1, "cost": 2.5})
    assert found.chosen is not None and found.chosen.method == "full"
    assert {
        "budget.hours 1: not compared, because it is not known",
        "budget.cost 2.5: not compared, because it is not known",
    } <= set(found.reasons)
