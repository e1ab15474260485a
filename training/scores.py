"""Held-out rows one by one: loss, tokens and hits of each sample, so that two models can be compared on the same rows.

    loss            mean of -log p over trained tokens, nats          accuracy       share of them that the model would have said
    perplexity      its exponential                                   bits_per_byte  loss in bits over the UTF-8 bytes of those tokens

Bits per byte compare models of different tokenizers; the others do not. Left out: objectives over pairs, whose numbers come from
their own loss; what a difference means (`verdict.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.collate import collate

Sample = tuple[np.ndarray, np.ndarray]
COLUMNS = ("loss", "tokens", "correct")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model as it is asked: in a run on every rank, or opened afterwards on one."""

    model: Any  # what a forward goes through
    inside: Any  # the model itself, for generate()
    device: torch.device
    kernels: bool = False
    autocasting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    rank: int = 0
    world: int = 1
    total: Callable[..., list[float]] = lambda *values: [float(v) for v in values]
    most: Callable[..., list[int]] = lambda *values: [int(v) for v in values]
    rest: Callable[[], None] = lambda: None
    together: bool = False  # a forward takes all ranks
    came_on: Callable[[], None] = lambda: None  # told between forwards that may take long together


def of_stepper(stepper: Any) -> Subject:
    """The model of a running loop."""
    runtime = stepper.runtime
    return Subject(
        model=stepper.model, inside=stepper.model_inside(), device=runtime.device, kernels=stepper.kernels,
        autocasting=stepper.autocasting, rank=runtime.rank, world=runtime.world, total=runtime.total, most=runtime.most,
        rest=stepper.layout.rest, together=stepper.layout.together, came_on=runtime.loads_on,
    )  # fmt: skip


@contextlib.contextmanager
def asking(subject: Subject) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's own precision."""
    was = subject.model.training
    subject.model.eval()
    try:
        with torch.no_grad(), subject.autocasting():
            yield
    finally:
        subject.model.train(was)
        subject.rest()


def token_scores(subject: Subject, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(log p [B, T] fp32, hit [B, T] bool) of each label; 0 and False where there is none."""
    moved = {k: batch[k].to(subject.device) for k in ("input_ids", "position_ids", "labels")}
    labels = moved.pop("labels")
    if subject.kernels:
        found = subject.model(**moved, use_cache=False, token_labels=labels, token_argmax=True).token_loss
        return found.logp, (found.argmax == labels) & (labels >= 0)
    logits = subject.model(**moved, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return -losses.view(labels.shape), (logits.argmax(-1) == labels) & (labels >= 0)


def score(
    subject: Subject, samples: Callable[[int], Sample], rows: Sequence[Sequence[int]], *, micro_batch: int, pad_id: int
) -> dict[str, Any]:
    """`rows`: sample numbers packed together. Returns `loss` (summed as training sums it), and `rows`: columns `sample`, loss,
    tokens, correct, one entry per sample in the order of `rows`; collective, equal on all ranks."""
    order = [i for row in rows for i in row]
    place = {i: at for at, i in enumerate(order)}
    columns = np.zeros((len(COLUMNS), len(order)))
    summed = 0.0
    with asking(subject):
        for first in range(0, len(rows), subject.world * micro_batch):
            mine = (
                rows[first + subject.rank * micro_batch :][:micro_batch]
                if first + subject.rank * micro_batch < len(rows)
                else []
            )
            batch = collate([[samples(i) for i in row] for row in mine], pad_id=pad_id)
            logp, hit = token_scores(subject, batch)
            summed += float(-logp.sum())
            trained = (batch["labels"] >= 0).numpy()
            parts = (-logp.double().cpu().numpy(), trained, hit.cpu().numpy())
            for b, row in enumerate(mine):
                start = 0
                for i, length in zip(row, batch["seq_lens"][b], strict=True):
                    columns[:, place[i]] = [part[b, start : start + length].sum() for part in parts]
                    start += length
    summed, *flat = subject.total(summed, *columns.ravel().tolist())
    table = dict(zip(COLUMNS, np.reshape(flat, columns.shape).tolist(), strict=True))
    return {"loss": summed / max(sum(table["tokens"]), 1), "rows": {"sample": [int(i) for i in order], **table}}


def text_bytes(samples: Callable[[int], Sample], order: Sequence[int], tokenizer: Any) -> list[int]:
    """UTF-8 bytes of the trained part of each sample."""
    texts = [tokenizer.decode(ids[mask.astype(bool)], skip_special_tokens=True) for ids, mask in map(samples, order)]
    return [len(text.encode("utf-8")) for text in texts]


def summary(found: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """The figures of a model from its rows; `sizes` are the bytes of each row's trained text."""
    rows = found["rows"]
    tokens, loss = sum(rows["tokens"]), found["loss"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sum(rows["correct"]) / max(tokens, 1),
        "bits_per_byte": sum(rows["loss"]) / math.log(2) / max(sum(sizes), 1),
        "tokens": int(tokens),
        "rows": {**rows, "bytes": list(sizes)},
    }
