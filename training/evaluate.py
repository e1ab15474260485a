"""Held-out loss and answers side by side: the same rows and prompts before and after training.

Left out: task metrics, forgetting and confidence intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .data import TokenSet, pack
from .data.collate import collate
from .step import Stepper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_SEED = 0  # the held-out rows are packed the same way every time


class HeldOut:
    """The held-out samples in micro-batches, dealt to ranks by turns; and the prompts of the first few of them."""

    def __init__(self, samples: TokenSet, *, max_length: int, packing: bool, micro_batch: int, max_rows: int | None):
        self.samples = samples
        self.micro_batch = micro_batch
        count = min(len(samples), max_rows or len(samples))
        # Evenly over the file, not its head: held-out files are often sorted by source.
        self.chosen = [i * len(samples) // count for i in range(count)]
        lengths = [samples.lengths[i] for i in self.chosen]
        rows = pack(lengths, max_length, EVAL_SEED) if packing else [(i,) for i in range(count)]
        self.rows = [[self.chosen[i] for i in row] for row in rows]

    def batches(self, rank: int, world: int, pad_id: int) -> Iterator[Mapping[str, Any]]:
        for start in range(rank * self.micro_batch, len(self.rows), world * self.micro_batch):
            rows = self.rows[start : start + self.micro_batch]
            yield collate([[self.samples.sample(i) for i in row] for row in rows], pad_id=pad_id)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, reference ids) of `count` samples spread evenly over the held-out set."""
        count = min(count, len(self.chosen))
        picked = [self.chosen[(2 * i + 1) * len(self.chosen) // (2 * count)] for i in range(count)]
        return [(list(map(int, p)), list(map(int, r))) for p, r in map(self.samples.prompt, picked)]


def held_out_loss(stepper: Stepper, data: HeldOut, pad_id: int) -> dict[str, Any]:
    """Mean loss over the trained tokens of all held-out rows, and its exponential; collective, equal on all ranks."""
    runtime = stepper.runtime
    summed = trained = 0.0
    with evaluating(stepper.model), torch.no_grad():
        for batch in data.batches(runtime.rank, runtime.world, pad_id):
            summed += float(stepper.loss(batch))
            trained += int(batch["num_trained"])
    summed, trained = runtime.total(summed, trained)
    loss = summed / max(trained, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(trained)}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def answers(
    stepper: Stepper,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[list[int], list[int]]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers of the model as it is now, one per prompt. Local to the calling rank."""
    model: Any = getattr(stepper.model, "module", stepper.model)
    texts = []
    with evaluating(model), torch.no_grad(), stepper.autocasting():
        for prompt, _ in prompts:
            ids = torch.tensor([prompt], device=stepper.runtime.device)
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
