"""What a rank knows of the end of its time."""

from __future__ import annotations

import time

import pytest
from trebuchet.training.runtime import time_ends


@pytest.mark.parametrize(
    ("left_s", "lead_s", "ends"), [(100, 0, False), (100, 90, False), (100, 110, True), (-5, 0, True)]
)
def test_the_time_limit_is_met_with_its_lead(
    left_s: int, lead_s: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left_s))
    assert time_ends(lead_s) is ends


@pytest.mark.parametrize("word", ["", "Unknown"])
def test_no_limit_never_ends(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", word)
    assert not time_ends(1e9)
