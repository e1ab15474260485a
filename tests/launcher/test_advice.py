"""Notes of practice: each appears where it should, with its reason, and nowhere else; none makes a plan infeasible."""

from __future__ import annotations

from typing import Any

import pytest
from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.planner import make_plan


def plan(examples: int | None = 5000, **sections: Any) -> Plan:
    config = build_config({"model": "meta-llama/Llama-3.1-8B", "data": "t.jsonl", **sections})
    return make_plan(config, load_model_spec(config.model), load_cluster("rtx4090-1"), examples=examples)


def test_an_ordinary_run_is_left_in_peace() -> None:
    assert plan().advice == ()


@pytest.mark.parametrize(
    ("examples", "sections", "words"),
    [
        (499, {}, ["499 training examples", "often overfit"]),
        (5000, {"objective": "pretrain"}, ["knowledge rather than behaviour", "retrieval"]),
        (5000, {"data": {"train": "t.jsonl", "eval": 0}}, ["no held-out rows", "whether training helped"]),
        (5000, {"optimization": {"learning_rate": 1e-3}}, ["outside 0.0001 to 0.0003", "lora", "forgets"]),
        (5000, {"optimization": {"learning_rate": 1e-6}}, ["outside 0.0001 to 0.0003", "hardly learns"]),
        (5000, {"optimization": {"epochs": 6}}, ["6 epochs", "held-out loss usually rises"]),
        (5000, {"strategy": {"lora": {"r": 65}}}, ["rank 65", "little more to gain"]),
        (50001, {}, ["50,001 examples for 3 epochs", "one or two passes"]),
        (5000, {"data": {"train": "t.jsonl", "max_length": 262144}}, ["longer than the model's"]),
    ],
)
def test_a_note_with_its_reason(examples: int, sections: dict[str, Any], words: list[str]) -> None:
    found = plan(examples, **sections)
    (note,) = found.advice
    assert all(word in note for word in words), note
    if "max_length" not in str(sections):  # a row of 262,144 tokens does not fit, and that is no matter of advice
        assert found.feasible


@pytest.mark.parametrize(
    ("examples", "sections"),
    [
        (500, {}),
        (None, {}),
        (5000, {"optimization": {"learning_rate": 1e-4}}),
        (5000, {"optimization": {"learning_rate": 3e-4}}),
        (5000, {"optimization": {"epochs": 5}}),
        (5000, {"strategy": {"lora": {"r": 64}}}),
        (50000, {}),
    ],
)
def test_the_edges_are_inside(examples: int | None, sections: dict[str, Any]) -> None:
    assert plan(examples, **sections).advice == ()
