"""One optimizer step against float64 and plain transformers: loss, gradient and update, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trebuchet.training.data import share
from trebuchet.training.loop import Loop


def gradients(loop: Loop, parts: list[tuple[int, ...]]) -> tuple[torch.Tensor, Any]:
    """The gradient that the optimizer was handed, as one vector, and the step's result."""
    seen: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    hook = loop.stepper.optimizer.register_step_pre_hook(keep)
    result = loop.stepper.step([loop.batch(part) for part in parts])
    hook.remove()
    return seen[0], result


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("packing", [True, False])
def test_three_steps_equal_a_float64_loop_of_plain_transformers(
    make_loop: Callable[..., Loop],
    tiny_model: Path,
    rows_file: Path,
    by_template: Callable[[Path], Any],
    reference_loss: Callable[..., torch.Tensor],
    packing: bool,
    kernels: str,
) -> None:
    """Every row in each step, so that order does not matter: loss, gradient norm, warm-up, clipping, decay, AdamW."""
    steps, rate = 3, 3e-3
    settings = {"data.packing": packing, "strategy.kernels": kernels, "optimization.max_steps": steps}
    clip_and_decay = {"optimization.max_grad_norm": 0.5, "optimization.weight_decay": 0.1}
    rates_and_warmup = {"optimization.learning_rate": rate, "optimization.warmup": 1}
    loop = make_loop({**settings, **clip_and_decay, **rates_and_warmup})
    everything = tuple(range(len(loop.rows)))
    ours = [loop.stepper.step([loop.batch(part) for part in share(everything, 0, 1, 4)]) for _ in range(steps)]

    samples = by_template(rows_file)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    decayed = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(decayed, lr=rate)
    rates = [0.0, rate, rate * 0.5]  # warm-up of one step from 0, then half a cosine over the two that are left
    for step in range(steps):
        loss = reference_loss(model, samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        # fp32 rounding through two layers; the third step carries the rounding of the first two.
        assert ours[step].loss == pytest.approx(float(loss), rel=1e-5)
        assert ours[step].grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert ours[step].learning_rate == pytest.approx(rates[step], abs=1e-12)
    assert float(norm) > 0.5  # clipping was at work
    for name, wanted in model.named_parameters():
        found = dict(loop.stepper.model_inside().named_parameters())[name].double()
        assert torch.allclose(found, wanted, atol=2e-5), name  # Adam divides by small moments: 3 steps of 3e-3 each


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(make_loop: Callable[..., Loop]) -> None:
    rows = (0, 1, 2, 3)
    found = {}
    for micro in (4, 1, 2, 3):
        loop = make_loop({"optimization.max_grad_norm": 0, "optimization.micro_batch": micro})
        found[micro] = gradients(loop, share(rows, 0, 1, micro))
    whole, result = found[4]
    assert whole.norm() > 0 and result.trained_tokens > 0
    for micro in (1, 2, 3):
        other, same = found[micro]
        # fp32 sums in another order; a mean per micro-batch would be off by tens of per cent
        assert (other - whole).norm() <= 1e-6 * whole.norm(), micro
        assert same.loss == pytest.approx(result.loss, rel=1e-6)
        assert (same.tokens, same.trained_tokens) == (result.tokens, result.trained_tokens)


def test_a_mean_per_micro_batch_would_be_caught(make_loop: Callable[..., Loop]) -> None:
    """The test above can fail: the rows differ in trained tokens, so the usual bug changes the gradient."""
    loop = make_loop({"optimization.max_grad_norm": 0})
    trained = [int(loop.batch([row])["num_trained"]) for row in range(4)]
    assert max(trained) > 1.2 * min(trained)


def test_rows_without_loss_and_empty_micro_batches_add_nothing(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop({"optimization.max_grad_norm": 0})
    plain, result = gradients(loop, [(0,), (1,)])
    loop = make_loop({"optimization.max_grad_norm": 0})
    padded, same = gradients(loop, [(0,), (), (1,), ()])
    assert same == result and torch.equal(padded, plain)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    model = loop.stepper.model_inside()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n).fill_(float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="not finite; the weights were not updated"):
        loop.stepper.step([loop.batch([0])])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def loss(loop: Loop, rows: list[tuple[int, ...]]) -> float:
    """Sum of token losses of one micro-batch of packed rows."""
    batch = loop.stepper.objective.collate(loop.units, rows, packing=True, pad_id=0, width=None)
    return float(loop.stepper.loss(batch).sums)


def test_packed_samples_do_not_see_each_other(make_loop: Callable[..., Loop]) -> None:
    """The loss of a packed row is the sum of its samples' losses, each alone."""
    for kernels in ("on", "off"):
        loop = make_loop({"strategy.kernels": kernels})
        row = max(loop.rows, key=len)
        assert len(row) > 1
        with torch.no_grad():
            packed = loss(loop, [row])
            alone = sum(loss(loop, [(i,)]) for i in row)
        assert float(packed) == pytest.approx(alone, rel=1e-6), kernels
