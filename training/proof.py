"""Is a written model the model that it was made from? Logits of both on held-out prompts, each read module by module.

The measure is the size of the difference against the spread of the logits: the root mean square over all positions and tokens of
(written - reference), divided by the standard deviation of the reference's logits; 0.01 is a hundredth of what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..launcher.errors import JobFailed
from .streamed import Fetch, streaming

PROMPTS, TOKENS = 4, 96  # enough positions (a few hundred) for a mean; logits of a vocabulary of 256,000 take 400 MB
# Largest relative difference that is taken for rounding of the weights in the dtype written: 24, 11 and 8 bits of mantissa, with room
# for layers that round one after the other. Chosen, not measured on large models; the figure of each merge stands in its card.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True, kw_only=True)
class Difference:
    relative: float  # root mean square of the difference over the standard deviation of the reference
    largest: float  # largest absolute difference of one logit
    kl_nats: float  # mean KL(reference || written) per position
    same_token: float  # share of positions where both prefer the same next token
    prompts: int
    positions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        return (
            f"relative difference {self.relative:.2e}, largest {self.largest:.2e}, KL {self.kl_nats:.2e} nats, same next token at "
            f"{self.same_token:.1%} of {self.positions:,} positions of {self.prompts} held-out prompts"
        )


def batch_of(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids [B, T], mask [B, T]) of the first tokens of each prompt, padded on the right, where a causal model cannot see it."""
    cut = [list(map(int, p))[:TOKENS] for p in prompts[:PROMPTS] if len(p)]
    width = max(map(len, cut))
    ids = torch.full((len(cut), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(cut), width), dtype=torch.bool)
    for row, tokens in enumerate(cut):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
    return ids, mask


def logits_of(model: Any, fetch: Fetch, ids: Tensor, mask: Tensor) -> Tensor:
    """fp32 [positions, V] of a model without weights."""
    with streaming(model, fetch), torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[mask].float()


def compare(reference: Tensor, written: Tensor, prompts: int) -> Difference:
    """Both [positions, V]. Not finite in `written` gives infinite figures, in `reference` nan: neither passes a tolerance."""
    error = (written - reference).double()
    p, q = reference.double().log_softmax(-1), written.double().log_softmax(-1)
    return Difference(
        relative=float(error.square().mean().sqrt() / reference.double().std()),
        largest=float(error.abs().max()),
        kl_nats=float((p.exp() * (p - q)).sum(-1).mean()),
        same_token=float((reference.argmax(-1) == written.argmax(-1)).double().mean()),
        prompts=prompts,
        positions=len(reference),
    )


def require(found: Difference, tolerance: float, what: str) -> None:
    """JobFailed unless the difference is at most `tolerance`; nan never is."""
    if not found.relative <= tolerance:
        raise JobFailed(
            f"{what} does not answer as base and adapter do: {found.words()}; at most {tolerance:g} is rounding in its dtype. It was "
            "not kept. Merge in fp32 (--dtype fp32), or look at the adapter: very large values round away."
        )
