"""What all objectives share: the form of a result, log-probabilities of tokens and of documents, and rows into batches.

Labels are shifted already (labels[t] is the token after t; -100 carries no loss). One door to the model: with the kernel
layer on it returns per-token log-probabilities itself and the logits never exist whole; with it off, plain transformers
computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Units
from ..data.collate import IGNORE, Sample, collate

Batch = Mapping[str, Any]
Total = Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`sums` [K] fp32, with a gradient: the parts of the loss, each summed over the micro-batch; part k is to be divided by
    count k of the whole global batch. `tally` [M] fp32, without: sums that `figures` makes numbers for people of. `each` [N, C],
    without: of every pair or row, what the objective's `columns` name."""

    sums: Tensor
    tally: Tensor
    each: Tensor


class Objective(Protocol):
    """See the head of the package. `reference`, where an objective has one, is put there by the session."""

    reference: Any
    estimates: bool  # whether the loss of each row needs an estimate over the whole global batch: `divergence`
    columns: tuple[str, ...]  # of `Outcome.each`, by which two models are compared pair by pair; larger is better

    def collate(
        self, units: Units, rows: Sequence[Sequence[int]], *, packing: bool, pad_id: int, width: int | None
    ) -> dict[str, Any]:
        """One micro-batch of `rows`, each a list of units. `packing`: a row's documents stand behind one another; else each
        is a row of its own. `width`: rows are as wide as a multiple of it. No rows: one row of padding without loss."""

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """What the parts of the loss are divided by, of this micro-batch."""

    def divergence(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        """[sum, count] of that estimate. What comes of it is given to the loss as `batch["divergence"]`, a scalar."""

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Outcome:
        """One forward pass. Sums over no rows are 0 and have a gradient."""

    def figures(self, means: Sequence[float], counts: Sequence[float], tally: Sequence[float]) -> dict[str, float]:
        """Numbers for people, from means and counts over all ranks and the summed tallies."""


def moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return {k: move(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    return {k: move(v) for k, v in batch.items()}


def with_divergence(
    objective: Objective,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    kernels: bool,
    total: Total,
) -> Iterable[Batch]:
    """The batches, with the estimate over all of them and all ranks where the objective needs one. Called without gradients, in
    the precision of the run; `total` sums numbers over ranks."""
    if not objective.estimates:
        return batches
    batches, parts = list(batches), [torch.zeros(2, device=device)]
    for batch in batches:
        parts.append(objective.divergence(model, moved(batch, device), kernels=kernels))
    summed, count = total(*torch.stack(parts).double().sum(0).tolist())
    divergence = torch.tensor(max(summed / max(count, 1), 0.0), dtype=torch.float32)
    return [{**batch, "divergence": divergence} for batch in batches]


def token_logps(model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
    """Log-probability of every label, fp32 [B, T], 0 where ignored. `batch`: input_ids, position_ids, labels, each [B, T]."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if kernels:
        return model(**inputs, token_labels=batch["labels"]).token_loss.logp
    logits = model(**inputs).logits
    labels = batch["labels"]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -losses.view(labels.shape)


def per_document(values: Tensor, batch: Batch) -> Tensor:
    """Sums of `values` [B, T] over each document of the batch, [D]; values of padding must be 0. With no document it is empty
    and still has its gradient. A split and sums, not a scatter: their order is the same on every device and in every run."""
    if not batch["sizes"]:
        return values.flatten()[:0]
    return torch.stack([part.sum() for part in values.flatten().split(batch["sizes"])])


def document_batch(
    rows: Sequence[Sequence[Sample]], *, packing: bool, pad_id: int, width: int | None
) -> dict[str, Any]:
    """A micro-batch of documents. `rows`: documents of the units of each row. Besides what `collate` returns, `sizes` are the
    tokens of each document in the flattened batch, the padding of a row counted to its last one."""
    laid = [[document] for row in rows for document in row] if not packing else [list(row) for row in rows]
    batch = collate(laid, pad_id=pad_id, pad_to_multiple_of=width)
    columns = batch["input_ids"].shape[1]
    sizes: list[int] = []
    for lengths in batch["seq_lens"]:
        sizes += [*lengths[:-1], columns - sum(lengths[:-1])]
    return {**batch, "sizes": sizes}
