"""One optimizer step, exact: the gradient is that of the mean loss over the trained tokens (pairs, rows) of the global batch.

Whatever the number of ranks and micro-batches: each micro-batch contributes its *sum* of losses, divided once by what the whole
global batch holds (known before the first forward). The usual bug, a mean per micro-batch, is off by a factor of up to two in the
gradient on uneven lengths (measured).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..strategies.layouts import Layout
from .objectives import Objective, Outcome
from .objectives.base import Batch, moved, with_divergence
from .phases import OTHER
from .runtime import Runtime


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    figures: Mapping[str, float] = field(default_factory=dict)  # what else the objective tells: accuracy, margin, …


@dataclass
class Stepper:
    runtime: Runtime
    layout: Layout
    schedule: LRScheduler
    objective: Objective
    kernels: bool
    autocast: torch.dtype | None
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None  # fp16 only: gradients below 6e-8 would be 0

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """`batches` are this rank's micro-batches; every rank has the same number, empty ones included.

        Raises FloatingPointError when the loss or the gradient is not finite: before the weights are touched.
        """
        self.runtime.memory.enter("forward_backward")
        tokens = sum(int(b["num_tokens"]) for b in batches)
        trained = sum(int(b["num_trained"]) for b in batches)
        counts = [sum(column) for column in zip(*(self.objective.counts(b) for b in batches), strict=True)]
        all_tokens, all_trained, *counts = self.runtime.total(tokens, trained, *counts)
        # Every layout averages gradients over ranks; the world size makes it a sum.
        scales = torch.tensor([self.runtime.world / max(n, 1) for n in counts], device=self.runtime.device)
        batches = list(self.with_divergence(batches))
        sums, tally = torch.zeros(len(counts), dtype=torch.float64), torch.zeros(0)
        for i, batch in enumerate(batches):
            with self.layout.accumulating(i == len(batches) - 1):
                outcome = self.loss(batch)
                self.layout.backward(self._scaled((outcome.sums * scales).sum()))
            sums += outcome.sums.detach().double().cpu()
            tally = outcome.tally.double().cpu() + (tally if len(tally) else 0)
        means, figures = self.figures(sums, tally, counts)
        mean = sum(means)
        norm = self._clip()
        # In fp16 an infinite gradient is the scaler's way of finding its scale: it skips the update and halves it.
        if not math.isfinite(mean) or not (math.isfinite(norm) or self.scaler):
            raise FloatingPointError(f"loss {mean}, gradient norm {norm}: not finite; the weights were not updated")
        rate = float(self.schedule.get_last_lr()[0])
        self.runtime.memory.enter("optimizer_step")
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.layout.step()
        self.runtime.memory.enter(OTHER)
        self.schedule.step()
        figures.pop("perplexity", None)  # of one batch it says nothing that the loss does not
        return StepResult(mean, norm, rate, int(all_tokens), int(all_trained), figures)

    def figures(
        self, sums: torch.Tensor, tally: torch.Tensor, counts: Sequence[float]
    ) -> tuple[list[float], dict[str, float]]:
        """(mean of each part of the loss, the objective's other numbers), over all ranks. `counts` are of all ranks already."""
        totals = self.runtime.total(*sums.tolist(), *tally.tolist())
        means = [value / max(n, 1) for value, n in zip(totals, counts, strict=False)]
        return means, self.objective.figures(means, counts, totals[len(means) :])

    def with_divergence(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches, with the estimate over all of them and all ranks where the objective needs one."""
        device, total = self.runtime.device, self.runtime.total
        with torch.no_grad(), self.autocasting():
            return with_divergence(
                self.objective, self.model, batches, device=device, kernels=self.kernels, total=total
            )

    def loss(self, batch: Batch) -> Outcome:
        """The objective on one micro-batch on this device."""
        with self.autocasting():
            return self.objective(self.model, moved(batch, self.runtime.device), kernels=self.kernels)

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
