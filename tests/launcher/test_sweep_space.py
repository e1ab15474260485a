"""Spaces of sweeps: what they expand to, and that it depends on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from trebuchet.launcher.errors import ConfigError
from trebuchet.launcher.schema_sweep import Sweep
from trebuchet.launcher.sweep_space import expand, ranges, size_of
from trebuchet.slurm.states import tasks

RATE = {"optimization.learning_rate": {"log_uniform": [1e-5, 1e-3]}}
RANK = {"strategy.lora.r": {"choice": [8, 16]}}


GOLDEN = [
    {"optimization.learning_rate": 5.14127e-05, "strategy.lora.r": 8},
    {"optimization.learning_rate": 9.59707e-05, "strategy.lora.r": 8},
    {"optimization.learning_rate": 6.32185e-05, "strategy.lora.r": 8},
]


def sweep(space: dict[str, Any], **changes: Any) -> Sweep:
    return Sweep.model_validate({"space": space, "method": "random", "trials": 8, **changes})


def test_a_grid_is_every_combination_in_the_order_of_the_yaml() -> None:
    space = {"a": {"choice": [1, 2]}, "b": {"choice": ["x", "y", "z"]}}
    found = expand(sweep(space, method="grid", trials=None))
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    with pytest.raises(ConfigError, match="the grid has 6 points, not 5"):
        expand(sweep(space, method="grid", trials=5))


def test_drawn_values_are_the_same_everywhere() -> None:
    """Written down from one machine; the source is SHA-256, so every other one draws them too."""
    assert expand(sweep({**RATE, **RANK}, trials=3)) == GOLDEN


def test_more_trials_and_more_keys_leave_the_others_alone() -> None:
    few, many = expand(sweep(RATE, trials=4)), expand(sweep(RATE, trials=9))
    assert many[:4] == few
    both = expand(sweep({**RANK, **RATE}, trials=4))
    assert [point["optimization.learning_rate"] for point in both] == [
        point["optimization.learning_rate"] for point in few
    ]
    assert expand(sweep(RATE, trials=4, seed=1)) != few


@given(st.integers(0, 2**31), st.floats(1e-9, 1e3), st.floats(1.01, 1e6), st.integers(-50, 50), st.integers(1, 99))
def test_values_lie_in_their_ranges(seed: int, low: float, factor: float, first: int, width: int) -> None:
    high = low * factor
    space = {
        "log": {"log_uniform": [low, high]},
        "flat": {"uniform": [low, high]},
        "whole": {"int_uniform": [first, first + width]},
        "one": {"choice": ["a", None, [1, 2]]},
    }
    for point in expand(sweep(space, trials=5, seed=seed)):
        assert low <= point["log"] <= high and low <= point["flat"] <= high
        assert isinstance(point["whole"], int) and first <= point["whole"] <= first + width
        assert point["one"] in ["a", None, [1, 2]]


def test_log_uniform_is_uniform_in_the_logarithm() -> None:
    """Half of 2,000 draws over two decades lie in each; five standard deviations of a binomial are 112."""
    drawn = [point["optimization.learning_rate"] for point in expand(sweep(RATE, trials=2000))]
    assert abs(sum(math.log10(rate) < -4 for rate in drawn) - 1000) < 112


def test_a_finite_space_is_drawn_without_repeating() -> None:
    space = {"a": {"choice": [1, 2, 3]}, "b": {"int_uniform": [0, 3]}}
    found = expand(sweep(space, trials=12))
    assert len({str(point) for point in found}) == 12 == size_of(sweep(space, trials=12))
    with pytest.raises(ConfigError, match="holds 12 different trials, and 13 are wanted"):
        expand(sweep(space, trials=13))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"space": {}}, "space"),
        ({"space": {"a": {"choice": []}}}, "choice"),
        ({"space": {"a": {"choice": [1], "uniform": [0, 1]}}}, "exactly one of"),
        ({"space": {"a": {"uniform": [1, 1]}}}, "first end must be below"),
        ({"space": {"a": {"log_uniform": [0, 1]}}}, "positive"),
        ({"space": RATE, "method": "grid", "trials": None}, "a grid takes choices only"),
        ({"space": RANK, "trials": None}, "needs trials"),
        ({"space": {"a": {"choise": [1]}}}, "choise"),
    ],
)
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        sweep(**settings)


@given(st.sets(st.integers(0, 3000), min_size=1))
def test_numbers_of_tasks_are_written_and_read(numbers: set[int]) -> None:
    written = ranges(sorted(numbers))
    assert tasks(f"12_[{written}%5]") == [f"12_{n}" for n in sorted(numbers)]
    assert tasks("12_7") == ["12_7"] and tasks("12_[0-8:4]") == ["12_0", "12_4", "12_8"]
