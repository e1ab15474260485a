"""Held-out loss and answers side by side: the same rows and prompts before and after training.

Left out: task metrics, forgetting and confidence intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .data import Units, pack
from .scores import Subject, asking
from .step import Stepper

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

    def batches(self, stepper: Stepper, pad_id: int) -> Iterator[Mapping[str, Any]]:
        """Every rank gets the same number, since a forward may be a collective; the last may be empty."""
        rank, world = stepper.runtime.rank, stepper.runtime.world
        for first in range(0, len(self.rows), world * self.micro_batch):
            start = first + rank * self.micro_batch
            rows = self.rows[start : start + self.micro_batch]
            yield stepper.objective.collate(self.units, rows, packing=self.packing, pad_id=pad_id, width=None)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, reference ids) of `count` samples spread evenly over the held-out set."""
        count = min(count, len(self.chosen))
        picked = [self.chosen[(2 * i + 1) * len(self.chosen) // (2 * count)] for i in range(count)]
        return [(list(map(int, p)), list(map(int, r))) for p, r in map(self.units.prompt, picked)]


def held_out_loss(stepper: Stepper, data: HeldOut, pad_id: int) -> dict[str, Any]:
    """Mean loss over the trained tokens (pairs, rows) of all held-out rows and the objective's other numbers: perplexity, or
    accuracy and margin; collective, equal on all ranks."""
    runtime = stepper.runtime
    sums, tally, counts, trained = _Sums(), _Sums(), _Sums(), 0
    with evaluating(stepper.model), torch.no_grad():
        for batch in stepper.with_divergence(data.batches(stepper, pad_id)):
            outcome = stepper.loss(batch)
            sums.add(outcome.sums)
            tally.add(outcome.tally)
            counts.add(torch.tensor(stepper.objective.counts(batch)))
            trained += int(batch["num_trained"])
    stepper.layout.rest()
    # A rank without rows has none of these and must sum as many numbers as the others.
    sizes = runtime.most(len(sums.value), len(tally.value))
    all_counts = runtime.total(*counts.filled(sizes[0]).tolist(), trained)
    means, figures = stepper.figures(sums.filled(sizes[0]), tally.filled(sizes[1]), all_counts[:-1])
    return {"loss": sum(means), **figures, "tokens": int(all_counts[-1])}


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
