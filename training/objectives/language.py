"""Language modelling: sft and pretrain. Which tokens carry loss is in the labels, so both are one loss:

-sum of log p over the trained tokens, divided by their number in the whole global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...launcher.schema import Objective as Settings
from ..data import Units
from .base import Batch, Outcome, document_batch, token_logps


class Language:
    def __init__(self, settings: Settings):
        self.reference: Any = None
        self.estimates = False
        self.columns: tuple[str, ...] = ()  # its held-out rows are scored token by token (`scores.py`)

    def collate(
        self, units: Units, rows: Sequence[Sequence[int]], *, packing: bool, pad_id: int, width: int | None
    ) -> dict[str, Any]:
        documents = [[d for i in row for d in units.documents(i)] for row in rows]
        return document_batch(documents, packing=packing, pad_id=pad_id, width=width)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (int(batch["num_trained"]),)

    def divergence(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        raise AssertionError("not asked for: `estimates` is false")

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Outcome:
        loss = -token_logps(model, batch, kernels=kernels).sum()
        return Outcome(sums=loss[None], tally=torch.empty(0, device=loss.device), each=torch.empty(0, 0))

    def figures(self, means: Sequence[float], counts: Sequence[float], tally: Sequence[float]) -> dict[str, float]:
        return {"perplexity": math.exp(min(means[0], 700.0))}
