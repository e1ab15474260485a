"""Held-out loss and answers side by side: the same rows and prompts before and after training.

Left out: task metrics, forgetting and confidence intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import Units, pack
from .objectives import Objective
from .objectives.base import moved, with_divergence
from .scores import Subject, asking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_SEED = 0  # the held-out rows are packed the same way every time


class HeldOut:
    """The held-out samples in micro-batches, dealt to ranks by turns; and the prompts of the first few of them."""

    def __init__(self, units: Units, *, room: int, packing: bool, micro_batch: int, max_rows: int | None):
        """`room`: tokens of a packed row."""
        self.units, self.packing = units, packing
        self.micro_batch = micro_batch
        count = min(len(units), max_rows or len(units))
        # Evenly over the file, not its head: held-out files are often sorted by source.
        self.chosen = [i * len(units) // count for i in range(count)]
        lengths = units.lengths[self.chosen]
        rows = pack(lengths, room, EVAL_SEED) if packing else [(i,) for i in range(count)]
        self.rows = [[self.chosen[i] for i in row] for row in rows]

    def batches(self, subject: Subject, objective: Objective, pad_id: int) -> Iterator[Mapping[str, Any]]:
        """Every rank gets the same number, since a forward may be a collective; the last may be empty. `units`: the held-out
        samples of a batch, in its order."""
        rank, world = subject.rank, subject.world
        for first in range(0, len(self.rows), world * self.micro_batch):
            start = first + rank * self.micro_batch
            rows = self.rows[start : start + self.micro_batch]
            batch = objective.collate(self.units, rows, packing=self.packing, pad_id=pad_id, width=None)
            yield {**batch, "units": [i for row in rows for i in row]}

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, reference ids) of `count` samples spread evenly over the held-out set."""
        count = min(count, len(self.chosen))
        picked = [self.chosen[(2 * i + 1) * len(self.chosen) // (2 * count)] for i in range(count)]
        return [(list(map(int, p)), list(map(int, r))) for p, r in map(self.units.prompt, picked)]


def held_out_loss(subject: Subject, objective: Objective, data: HeldOut, pad_id: int) -> dict[str, Any]:
    """Of an objective over pairs or single answers: mean loss, its other numbers (accuracy, margin), and `rows`, the columns
    `sample` and `objective.columns` with one entry per held-out pair in the order of the file; collective, equal on all ranks."""
    sums, tally, counts, trained = _Sums(), _Sums(), _Sums(), 0
    place = {unit: at for at, unit in enumerate(data.chosen)}
    table = np.zeros((len(objective.columns), len(place)))
    device, kernels = subject.device, subject.kernels
    with asking(subject):
        batches = data.batches(subject, objective, pad_id)
        for batch in with_divergence(
            objective, subject.model, batches, device=device, kernels=kernels, total=subject.total
        ):
            outcome = objective(subject.model, moved(batch, device), kernels=kernels)
            sums.add(outcome.sums)
            tally.add(outcome.tally)
            counts.add(torch.tensor(objective.counts(batch)))
            trained += int(batch["num_trained"])
            if batch["units"]:
                table[:, [place[unit] for unit in batch["units"]]] = outcome.each.detach().double().cpu().numpy().T
    # A rank without rows has none of these and must sum as many numbers as the others.
    parts, tallies = subject.most(len(sums.value), len(tally.value))
    totals = subject.total(
        *counts.filled(parts).tolist(), *sums.filled(parts).tolist(), *tally.filled(tallies).tolist(), trained,
        *table.ravel().tolist(),
    )  # fmt: skip
    counted, summed, told = totals[:parts], totals[parts : 2 * parts], totals[2 * parts : 2 * parts + tallies]
    means = [value / max(n, 1) for value, n in zip(summed, counted, strict=True)]
    columns = np.reshape(totals[2 * parts + tallies + 1 :], table.shape).tolist()
    return {
        "loss": sum(means),
        **objective.figures(means, counted, told),
        "tokens": int(totals[2 * parts + tallies]),
        "rows": {"sample": [int(i) for i in data.chosen], **dict(zip(objective.columns, columns, strict=True))},
    }


class _Sums:
    """A running sum of vectors in float64."""

    def __init__(self) -> None:
        self.value = torch.zeros(0, dtype=torch.float64)

    def add(self, part: torch.Tensor) -> None:
        self.value = part.detach().double().cpu() + (self.value if len(self.value) else 0)

    def filled(self, size: int) -> torch.Tensor:
        return self.value if len(self.value) else torch.zeros(size, dtype=torch.float64)


def in_words(found: Mapping[str, Any]) -> str:
    """`loss 0.431, accuracy 78.1%, margin 1.20`, or with the perplexity where there is one."""
    out = [f"loss {found['loss']:.3f}"]
    if "perplexity" in found:
        out.append(f"perplexity {found['perplexity']:.2f}")
    if "accuracy" in found:
        out.append(f"accuracy {found['accuracy']:.1%}")
    if "margin" in found:
        out.append(f"margin {found['margin']:.3f}")
    return ", ".join(out)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def answers(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[list[int], list[int]]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers of the model as it is now, one per prompt. Local to the calling rank, unless the layout works together: then
    every rank asks the same and, holding the same weights, hears the same."""
    model: Any = subject.inside
    texts = []
    with asking(subject):
        for prompt, _ in prompts:
            ids = torch.tensor([prompt], device=subject.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(end_ids(tokenizer, model)),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            texts.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return texts


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*configured, tokenizer.eos_token_id] if i is not None}
