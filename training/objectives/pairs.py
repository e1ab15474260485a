"""dpo, orpo, simpo and cpo: objectives of a chosen and a rejected answer, both in one forward pass.

Document 2k of a batch is the chosen side of pair k, 2k + 1 the rejected one; where rows are packed both stand in the same
row and do not see each other. Two parts: the pairs' loss by the number of pairs, and, where one is asked for, the loss on
the chosen side's tokens by their number (orpo: prompt and answer, cpo and dpo: the answer), both of the global batch. TRL
divides each by what its micro-batch holds, which differs from this on uneven lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...launcher.schema import Objective as Settings
from ..data import PairSet, Units
from ..data.collate import IGNORE
from . import losses
from .base import Batch, Outcome, document_batch, per_document, token_logps

PAIR_COLUMNS = ("accuracy", "margin")


class Pairs:
    def __init__(self, settings: Settings):
        self.name, self.loss, self.gamma = settings.name, settings.loss, settings.gamma
        self.beta = settings.beta_value
        self.label_smoothing = settings.label_smoothing
        self.sft_weight = settings.sft_weight_value
        self.reference: Any = None
        self.estimates = False
        self.columns: tuple[str, ...] = PAIR_COLUMNS

    def collate(
        self, units: Units, rows: Sequence[Sequence[int]], *, packing: bool, pad_id: int, width: int | None
    ) -> dict[str, Any]:
        documents = [[d for i in row for d in units.documents(i)] for row in rows]
        batch = document_batch(documents, packing=packing, pad_id=pad_id, width=width)
        batch["pairs"] = len(batch["sizes"]) // 2
        if self.name == "orpo":  # the chosen side is learnt whole; what is compared are the answers
            batch["compared"] = batch["labels"] != IGNORE
            whole = [[(ids, mask | (k % 2 == 0)) for k, (ids, mask) in enumerate(row)] for row in documents]
            batch["labels"] = document_batch(whole, packing=packing, pad_id=pad_id, width=width)["labels"]
        batch["chosen_tokens"] = self._chosen_tokens(batch) if self.sft_weight else 0
        if isinstance(units, PairSet) and units.reference is not None:
            batch["reference"] = torch.from_numpy(units.reference[[i for row in rows for i in row]].reshape(-1))
        return batch

    def _chosen_tokens(self, batch: Batch) -> int:
        return int(per_document((batch["labels"] != IGNORE).float(), batch)[0::2].sum())

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return batch["pairs"], batch["chosen_tokens"]

    def divergence(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        raise AssertionError("not asked for: `estimates` is false")

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Outcome:
        # The reference first, without gradients: what it needs is gone again before the pass that keeps activations.
        reference = self.reference(model, batch, kernels=kernels) if self.reference is not None else None
        logp = token_logps(model, batch, kernels=kernels)
        compared = batch["compared"] if "compared" in batch else batch["labels"] != IGNORE
        answers = per_document(logp * compared, batch)
        tokens = per_document(compared.float(), batch)
        score = answers if reference is None else answers - reference
        if self.name in ("orpo", "simpo") or self.loss == "ipo":
            score = score / tokens
        chosen, rejected = score[0::2], score[1::2]
        sums = [self._pair_losses(chosen, rejected).sum()]
        sums.append(self.sft_weight * -per_document(logp, batch)[0::2].sum() if self.sft_weight else logp.sum() * 0)
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        return Outcome(sums=torch.stack(sums), **pair_tally(*rewards))

    def _pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.name == "orpo":
            return self.beta * losses.odds_ratio(chosen, rejected)
        if self.name == "simpo":
            return losses.preference("sigmoid", chosen - rejected - self.gamma / self.beta, self.beta)
        return losses.preference(self.loss, chosen - rejected, self.beta, self.label_smoothing)

    def figures(self, means: Sequence[float], counts: Sequence[float], tally: Sequence[float]) -> dict[str, float]:
        return pair_figures(counts[0], tally)


def pair_tally(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """`tally` and `each` of an Outcome from the rewards [P] of both sides."""
    won = losses.won(chosen, rejected)
    return {
        "tally": torch.stack([won.sum(), chosen.sum(), rejected.sum()]),
        "each": torch.stack([won, chosen - rejected], dim=1),
    }


def pair_figures(pairs: float, tally: Sequence[float]) -> dict[str, float]:
    """Share of pairs whose chosen side is ahead, and mean rewards, from (won, chosen rewards, rejected rewards) summed."""
    won, chosen, rejected = (value / max(pairs, 1) for value in tally)
    return {"accuracy": won, "margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected}
