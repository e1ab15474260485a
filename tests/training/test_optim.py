"""8-bit optimizers: bitsandbytes' own as it is, the kernel layer's against it, both over shards, and their checkpoints; schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from trebuchet.launcher.schema import Optimization
from trebuchet.training.loop import Loop
from trebuchet.training.optim import make_optimizer, make_schedule, warmup_steps

RATE, DECAY = 1e-2, 0.1
EIGHT_BIT = ("adamw-8bit", "adamw-8bit-kernel")


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """A matrix with 8-bit states, whose last block is not full; one too small for them; a norm."""
    torch.manual_seed(0)
    shapes = {"large": (130, 67), "small": (8, 8), "norm": (64,)}
    return {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_8bit_steps_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    wanted = parameters(dtype)
    groups = [
        {"params": [wanted["large"], wanted["small"]], "weight_decay": DECAY},
        {"params": [wanted["norm"]], "weight_decay": 0.0},
    ]
    train(bnb.optim.AdamW8bit(groups, lr=RATE), wanted)
    for name in EIGHT_BIT:
        ours = parameters(dtype)
        optimizer = make_optimizer(ours.items(), name, RATE, DECAY)
        train(optimizer, ours)
        state = optimizer.state[ours["large"]]
        assert state["state1"].dtype == torch.uint8 and optimizer.state[ours["small"]]["state1"].dtype == torch.float32
        assert state["absmax1"].numel() == -(-130 * 67 // 256)
        for key, p in ours.items():
            if name == "adamw-8bit" or key != "large":
                assert torch.equal(p, wanted[key]), (name, key)
            else:
                # Five steps of at most 1e-2 each; the two quantizers differ by one coarse level in a few codes of ten thousand
                # (tests/kernels/test_adamw8bit.py), and a level of the update is a few per cent of a step.
                assert (p - wanted[key]).abs().mean() < 0.02 * 5 * RATE


def test_small_parameters_step_as_torch_adamw() -> None:
    ours, wanted = parameters(torch.float32), parameters(torch.float32)
    train(make_optimizer(ours.items(), "adamw-8bit-kernel", RATE, DECAY), ours)
    train(make_optimizer(wanted.items(), "adamw", RATE, DECAY), wanted)
    for key in ("small", "norm"):
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-6, atol=1e-7)  # the same formula in fp32
    assert not torch.equal(ours["large"], wanted["large"])
    assert (ours["large"] - wanted["large"]).norm() / (
        wanted["large"] - parameters(torch.float32)["large"]
    ).norm() < 0.1


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_resume_is_exact_with_8bit_states(make_loop: Callable[..., Loop], name: str) -> None:
    changes: dict[str, Any] = {"optimization.optimizer": name}
    loop = make_loop(changes)
    losses = [loop.stepper.step([loop.batch(loop.order.batch(s))]).loss for s in range(2)]
    loop.save(2)
    losses += [loop.stepper.step([loop.batch(loop.order.batch(s))]).loss for s in range(2, 5)]
    again = make_loop(changes)
    again.runtime.folder = loop.runtime.folder
    assert again.resume() == 2
    eight = [s for s in again.stepper.optimizer.state.values() if s["state1"].dtype == torch.uint8]
    assert len(eight) > 5  # the model's matrices
    assert [again.stepper.step([again.batch(again.order.batch(s))]).loss for s in range(2, 5)] == losses[2:]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (0.3, 10), (4, 23), (5, 5), (9, 4), (0.05, 1000)])
def test_schedules_are_those_of_transformers(schedule: str, warmup: float, steps: int) -> None:
    """Every learning rate to the bit, one step beyond the end too; and a schedule goes on from its state."""
    from transformers import get_scheduler

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)

    settings = Optimization(schedule=schedule, warmup=warmup)
    ours, name = (
        make_schedule(optimizer(), settings, steps),
        "constant_with_warmup" if schedule == "constant" else schedule,
    )
    theirs = get_scheduler(name, optimizer(), num_warmup_steps=warmup_steps(warmup, steps), num_training_steps=steps)
    again = None
    for step in range(steps + 1):
        if step == steps // 2:
            again = make_schedule(optimizer(), settings, steps)
            again.load_state_dict(ours.state_dict())
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert again is None or step == steps // 2 or again.get_last_lr() == ours.get_last_lr()
        for each in (ours, theirs, again):
            if each is not None:
                each.optimizer.step()
                each.step()
