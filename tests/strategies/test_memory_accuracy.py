"""The memory estimate against published measurements: the bars that docs/accuracy.md states, and the page itself."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def load() -> ModuleType:
    """benchmarks/memory_accuracy.py, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("memory_accuracy", ROOT / "benchmarks" / "memory_accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


accuracy = load()


def test_core_rows_hold_the_bars() -> None:
    core = [row for row in accuracy.scores() if row.core]
    mean, within, lowest, _ = accuracy.summary(core)
    assert len(core) == 123
    assert all(row.estimated > 0 for row in core)
    assert mean <= 0.02
    assert within >= 0.92
    assert lowest >= -0.10


@pytest.mark.parametrize("region", ["fsdp-full", "fsdp-lora", "fsdp-qlora", "single-full", "single-lora", "t4", "moe"])
def test_no_region_hides_behind_the_average(region: str) -> None:
    """Each on its own within 2.5 %; single-qlora is left out, whose two LitGPT rows of 2023 are known misses."""
    mean, *_ = accuracy.summary([row for row in accuracy.scores() if row.core and row.region == region])
    assert mean <= 0.025


@pytest.mark.parametrize("seed", range(4))
def test_random_halves_by_model_hold_the_bar(seed: int) -> None:
    """A formula carried by a few well-covered models would fail on a half that lacks them. The bar of a half is wider:
    the two worst models (PowerLM, Llama 2 7B) can fall into the same one."""
    models = sorted({row.model for row in accuracy.scores()})
    half = set(random.Random(seed).sample(models, len(models) // 2))
    rows = [row for row in accuracy.scores() if row.core and row.model in half]
    assert accuracy.summary(rows)[0] <= 0.03


def test_boundary_pairs_are_decided_right() -> None:
    decisions = accuracy.decisions()
    assert len(decisions) == 32
    assert sum(verdict == ours for _, verdict, ours, _, _ in decisions) >= 31


def test_the_planner_s_margin_decides_them_right_too_and_covers_the_worst_underestimate() -> None:
    """The margin is what the lowest row asks for, to three places: no less, or a run of its kind would not hold; no more."""
    right = [verdict == accuracy.of_planner(needed, card) for _, verdict, _, needed, card in accuracy.decisions()]
    assert len(right) == 32 and sum(right) >= 31
    lowest = accuracy.summary([row for row in accuracy.scores() if row.core])[2]
    assert 0 <= 1 + lowest - accuracy.GPU_MARGIN < 0.001


def test_reserved_memory_is_near_where_it_was_published() -> None:
    """Rows that publish allocated and reserved: mean within 12 %, and reserved never below what is live."""
    errors = []
    for row in accuracy.read("calibration.csv"):
        if row["reserved_gib"] and row["core"] == "yes":
            found = accuracy.estimate(accuracy.request_of(row))
            assert found.peak_reserved_bytes >= found.peak_allocated_bytes
            errors.append(abs(found.peak_reserved_bytes / accuracy.GIB / float(row["reserved_gib"]) - 1))
    assert len(errors) == 37
    assert sum(errors) / len(errors) <= 0.12


def test_the_page_says_what_the_code_computes() -> None:
    page = accuracy.PAGE.read_text(encoding="utf-8")
    shown = page.partition(accuracy.BEGIN)[2].partition(accuracy.END)[0].strip()
    assert shown == accuracy.tables(), "run: python benchmarks/memory_accuracy.py --write"
