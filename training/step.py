"""One optimizer step, exact: the gradient is that of the mean loss over the trained tokens of the whole global batch.

Whatever the number of ranks and micro-batches: each micro-batch contributes its *sum* of token losses, divided once by the
number of trained tokens of the global batch (known before the first forward). The usual bug, a mean per micro-batch, is off by a
factor of up to two in the gradient on uneven lengths (measured).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..strategies.layouts import Layout
from .objectives import LOSSES
from .runtime import Runtime

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int


@dataclass
class Stepper:
    runtime: Runtime
    layout: Layout
    schedule: LRScheduler
    objective: str
    kernels: bool
    autocast: torch.dtype | None
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None  # fp16 only: gradients below 6e-8 would be 0

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """`batches` are this rank's micro-batches; every rank has the same number, empty ones included.

        Raises FloatingPointError when the loss or the gradient is not finite: before the weights are touched.
        """
        tokens = sum(int(b["num_tokens"]) for b in batches)
        trained = sum(int(b["num_trained"]) for b in batches)
        all_tokens, all_trained = self.runtime.total(tokens, trained)
        scale = self.runtime.world / max(
            all_trained, 1
        )  # every layout averages gradients over ranks; this makes it a sum
        summed = 0.0
        for i, batch in enumerate(batches):
            with self.layout.accumulating(i == len(batches) - 1):
                loss = self.loss(batch)
                self.layout.backward(self._scaled(loss * scale))
            summed += float(loss.detach())
        mean = self.runtime.total(summed)[0] / max(all_trained, 1)
        norm = self._clip()
        # In fp16 an infinite gradient is the scaler's way of finding its scale: it skips the update and halves it.
        if not math.isfinite(mean) or not (math.isfinite(norm) or self.scaler):
            raise FloatingPointError(f"loss {mean}, gradient norm {norm}: not finite; the weights were not updated")
        rate = float(self.schedule.get_last_lr()[0])
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.layout.step()
        self.schedule.step()
        return StepResult(mean, norm, rate, int(all_tokens), int(all_trained))

    def settle(self, batch: Batch) -> None:
        """DDP orders its buckets anew after the first backward, and over three or more ranks the order of the sums with them. One
        backward whose gradients are thrown away brings a fresh run and a resumed one into the same order before their first step."""
        if self.layout.settles:
            self.loss(batch).backward()
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum of token losses of one micro-batch on this device."""
        device = self.runtime.device
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with self.autocasting():
            return LOSSES[self.objective](self.model, moved, kernels=self.kernels)

    @property
    def model(self) -> torch.nn.Module:
        return self.layout.model

    @property
    def optimizer(self) -> Optimizer:
        return self.layout.optimizer

    def model_inside(self) -> torch.nn.Module:
        """The model without its DDP wrapper, so that parameter names are the same on one rank and on many."""
        return self.layout.inside

    def autocasting(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None or not self.layout.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.runtime.device.type, dtype=self.autocast)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss) if self.scaler else loss

    def _clip(self) -> float:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        return self.layout.clip(self.max_grad_norm)
