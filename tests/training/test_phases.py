"""Peaks by phase: what is held in one phase is not counted to the next, and the largest of all is not forgotten."""

from __future__ import annotations

import mmap

import pytest
import torch
from trebuchet.training.phases import COUNTED, OTHER, Peaks, give_back

MIB = 2**20


def held(mib: int) -> None:
    """Anonymous memory, written to, and given back to the system at once."""
    with mmap.mmap(-1, mib * MIB) as room:
        for page in range(0, mib * MIB, 4096):
            room[page] = 1


def test_each_phase_has_the_peak_of_what_it_held() -> None:
    peaks = Peaks(torch.device("cpu"))
    if not peaks.apart:
        pytest.skip("this system has no /proc/self/clear_refs, so peaks cannot be told apart")
    peaks.enter("load")
    held(192)
    peaks.enter("forward_backward")
    held(96)
    peaks.enter("optimizer_step")
    peaks.enter("forward_backward")
    held(32)
    peaks.enter(OTHER)
    load, forward, step, save, before = (value / MIB for value in peaks.values())
    assert load - before == pytest.approx(192, abs=16) and forward - before == pytest.approx(96, abs=16)
    assert step - before == pytest.approx(0, abs=16) and save == 0
    assert peaks.largest_bytes() / MIB >= load
    facts = peaks.facts(peaks.values())
    assert facts["what"] == "resident" and set(facts["phases_gib"]) == {"load", "forward_backward", "optimizer_step"}


def test_what_a_pass_freed_is_not_counted_to_the_optimizer_step() -> None:
    """128 MiB in blocks that the C library keeps, the last of them alive so that none goes back by itself."""
    peaks = Peaks(torch.device("cpu"))
    if not (peaks.apart and peaks.gives_back):
        pytest.skip("this system has no /proc/self/clear_refs or no malloc_trim")
    give_back()  # what other tests freed, which the blocks would be made of otherwise
    peaks.enter("load")
    for _ in range(COUNTED + 1):
        peaks.enter("forward_backward")
        blocks = [torch.ones(16 * 1024) for _ in range(2048)]
        del blocks[:-1]
        peaks.enter("optimizer_step")
        peaks.enter(OTHER)
    _, forward, step, _, before = (value / MIB for value in peaks.values())
    assert forward - before == pytest.approx(128, abs=16) and step - before == pytest.approx(0, abs=16)
    assert peaks.entered == {"optimizer_step": COUNTED + 1} and peaks.facts(peaks.values())["given_back"]


def test_where_the_mark_cannot_be_reset_nothing_is_told_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trebuchet.training.phases.CLEAR", type("No", (), {"write_text": _refuse})())
    peaks = Peaks(torch.device("cpu"))
    peaks.enter("load")
    peaks.enter(OTHER)
    facts = peaks.facts(peaks.values())
    assert not facts["by_phase"] and facts["phases_gib"] == {} and peaks.largest_bytes() > 0


def _refuse(*_: object, **__: object) -> int:
    raise PermissionError(13, "denied")
