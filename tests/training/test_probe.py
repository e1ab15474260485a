"""The probe step leaves no trace: runs with and without it are equal bit for bit; and it meets the heaviest batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trebuchet.training import loop as loops
from trebuchet.training.loop import Loop
from trebuchet.training.probe import heaviest

CASES = {
    "full": {"strategy.method": "full"},
    "full 8-bit": {"strategy.method": "full", "optimization.optimizer": "adamw-8bit"},
    "dropout": {"strategy.method": "lora", "strategy.lora": {"r": 4, "dropout": 0.3}, "strategy.checkpointing": "full"},
    "fp16": {"strategy.method": "lora", "model.dtype": "fp16", "strategy.kernels": "off"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_runs_with_and_without_are_equal(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    results, weights, real, seen = [], [], loops.probe, []
    for replaced in (lambda *a: (seen.append(a), real(*a)), lambda *a: None):
        monkeypatch.setattr(loops, "probe", replaced)
        loop = make_loop(changes)
        torch.manual_seed(5)
        assert loop.resume() == 0 and len(seen) == 1
        assert not loop.stepper.optimizer.state
        assert all(p.grad is None for p in loop.stepper.model.parameters())
        results.append([loop.stepper.step([loop.batch(loop.order.batch(s))]) for s in range(3)])
        weights.append(loop.stepper.model_inside().state_dict())
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_it_allocates_states_and_runs_the_heaviest_rows(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop({"optimization.micro_batch": 2})
    states: list[int] = []
    inside = loop.stepper.layout.optimizer
    real = type(loop.stepper).loss

    def loss(self: Any, batch: Any) -> Any:
        states.append(len(inside.state))
        states.append(int(batch["num_tokens"]))
        return real(self, batch)

    monkeypatch.setattr(type(loop.stepper), "loss", loss)
    loop.resume()
    sizes = sorted((sum(loop.units.lengths[i] for i in row) for row in loop.rows), reverse=True)
    trained = sum(p.requires_grad for p in loop.stepper.model.parameters())
    assert states == [trained, sum(sizes[:2])]


def test_heaviest() -> None:
    assert heaviest([(0,), (1, 2), (3,)], [5, 2, 4, 6], 2) == [1, 2]
    assert heaviest([(0,)], [5], 4) == [0]
