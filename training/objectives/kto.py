"""kto: single answers with a label, against how far the model has moved from its reference on average.

The divergence is estimated over the whole global batch, without gradient, before the losses: the mean of log p - ref over
each prompt with an answer to another one, at least 0. TRL estimates it per micro-batch and pairs answers inside it, so its
value depends on how the batch is cut; with the whole set in one micro-batch both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...launcher.schema import Objective as Settings
from ..data import JudgedSet, Units
from . import losses
from .base import Batch, Outcome, document_batch, per_document, token_logps


class Kto:
    def __init__(self, settings: Settings):
        self.beta = settings.beta_value
        self.weights = (settings.desirable_weight, settings.undesirable_weight)
        self.reference: Any = None
        self.estimates = True
        self.columns: tuple[str, ...] = ("accuracy",)  # a margin is between two sides, and these rows have one

    def collate(
        self, units: Units, rows: Sequence[Sequence[int]], *, packing: bool, pad_id: int, width: int | None
    ) -> dict[str, Any]:
        assert isinstance(units, JudgedSet)
        flat = [i for row in rows for i in row]
        layout: dict[str, Any] = {"packing": packing, "pad_id": pad_id, "width": width}
        batch = document_batch([[d for i in row for d in units.documents(i)] for row in rows], **layout)
        other = document_batch([[units.mismatched(i) for i in row] for row in rows], **layout)
        batch["wanted"] = torch.from_numpy(units.labels[flat])
        if units.reference is not None:
            batch["reference"], other["reference"] = torch.from_numpy(units.reference[flat]).unbind(1)
        return {**batch, "mismatched": other}

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (len(batch["wanted"]),)

    def divergence(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        moved = self._moved(model, batch["mismatched"], kernels=kernels)
        return torch.stack([moved.sum(), torch.tensor(float(len(moved)), device=moved.device)])

    def _moved(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        """log p - ref of each answer, [N]."""
        reference = self.reference(model, batch, kernels=kernels)
        return per_document(token_logps(model, batch, kernels=kernels), batch) - reference

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Outcome:
        moved = self._moved(model, batch, kernels=kernels)
        wanted, divergence = batch["wanted"], batch["divergence"]
        loss = losses.kto(moved, wanted, divergence, self.beta, self.weights).sum()
        rewards, sign = self.beta * moved.detach(), torch.where(wanted, 1.0, -1.0)
        right = losses.won(sign * rewards, sign * self.beta * divergence)
        good = wanted.float()
        tally = [right.sum(), good.sum(), (rewards * good).sum(), (rewards * (1 - good)).sum()]
        return Outcome(sums=loss[None], tally=torch.stack(tally), each=right[:, None])

    def figures(self, means: Sequence[float], counts: Sequence[float], tally: Sequence[float]) -> dict[str, float]:
        right, good, chosen, rejected = tally
        chosen, rejected = chosen / max(good, 1), rejected / max(counts[0] - good, 1)
        return {
            "accuracy": right / max(counts[0], 1),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
