"""One step's memory before step 1: optimizer states, then forward and backward on the heaviest micro-batch of the run.

What does not fit fails here, in the first minute and before a checkpoint exists, and not at the first long batch. Nothing is left
behind: gradients and states are dropped, weights take a step of learning rate 0 on gradients of 0, and the caller restores the random
states. Under DDP the same backward brings its buckets into their final order (a resumed run sums as the undisturbed one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .step import Stepper


def probe(stepper: Stepper, batch: Any) -> None:
    """Collective. Raises what the allocator raises. Weights, optimizer and schedule are afterwards as before, bit for bit."""
    layout = stepper.layout
    if layout.allocates:
        fill_states(layout.optimizer)
    [batch] = stepper.with_divergence([batch])
    with layout.accumulating(True):
        layout.backward(stepper.loss(batch).sums.sum())
    layout.discard()
    layout.optimizer.state.clear()


@torch.no_grad()
def fill_states(optimizer: torch.optim.Optimizer) -> None:
    """The states that the first step would make, of zeros."""
    if getattr(optimizer, "is_paged", False):
        return  # pages are no GPU memory, and bitsandbytes would keep these for good
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def heaviest(rows: Sequence[Sequence[int]], lengths: Sequence[int], micro_batch: int) -> list[int]:
    """The `micro_batch` rows with the most tokens, fewer where there are fewer; `lengths` by sample."""
    tokens = [sum(lengths[i] for i in row) for row in rows]
    return sorted(range(len(rows)), key=lambda row: (-tokens[row], row))[:micro_batch]
