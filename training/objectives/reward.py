"""reward: a score head, trained so that the chosen answer of a pair scores higher (Bradley-Terry).

The score of a document is read at its last token, as transformers' sequence classification and inference servers read it;
the template's text after the end token is part of the document. The head is made in `strategies/score.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...launcher.schema import Objective as Settings
from ..data import Units
from . import losses
from .base import Batch, Outcome, document_batch
from .pairs import PAIR_COLUMNS, pair_figures, pair_tally


class Reward:
    def __init__(self, settings: Settings):
        self.center = settings.center
        self.reference: Any = None
        self.estimates = False
        self.columns: tuple[str, ...] = PAIR_COLUMNS

    def collate(
        self, units: Units, rows: Sequence[Sequence[int]], *, packing: bool, pad_id: int, width: int | None
    ) -> dict[str, Any]:
        documents = [[d for i in row for d in units.documents(i)] for row in rows]
        batch = document_batch(documents, packing=packing, pad_id=pad_id, width=width)
        columns = batch["input_ids"].shape[1]
        ends = [b * columns + np.cumsum(lengths) - 1 for b, lengths in enumerate(batch["seq_lens"])]
        batch["ends"] = torch.from_numpy(np.concatenate([*ends, np.empty(0, np.int64)]).astype(np.int64))
        return batch

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (len(batch["ends"]) // 2,)

    def divergence(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        raise AssertionError("not asked for: `estimates` is false")

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Outcome:
        scores = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, score_at=batch["ends"]
        ).logits.float()
        chosen, rejected = scores[0::2], scores[1::2]
        loss = losses.bradley_terry(chosen, rejected, self.center).sum()
        return Outcome(sums=loss[None], **pair_tally(chosen.detach(), rejected.detach()))

    def figures(self, means: Sequence[float], counts: Sequence[float], tally: Sequence[float]) -> dict[str, float]:
        return pair_figures(counts[0], tally)
