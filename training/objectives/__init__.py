"""What is learnt: a collator and a loss for each objective, on the one loop.

    make(config.objective)          -> the objective
    objective.collate(units, …)     -> one micro-batch
    objective(model, batch, …)      -> Outcome: sums over the micro-batch, and what each of them is divided by
    objective.figures(…)            -> loss, perplexity, accuracy, … of a step or of the held-out rows

A loss leaves here as sums, because what it is divided by (trained tokens, pairs, rows) is counted over all ranks and
micro-batches of the global batch: so the gradient does not depend on how the batch is cut. The formulas are in
`losses.py`, where log-probabilities of the untrained model come from in `reference.py`. Left out: optimizer, ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from ...launcher.schema import Objective as Settings
from .base import Objective, Outcome
from .kto import Kto
from .language import Language
from .pairs import Pairs
from .reward import Reward

__all__ = ["Objective", "Outcome", "make"]


def make(settings: Settings) -> Objective:
    """The objective that a configuration names."""
    kinds: dict[str, Callable[[Settings], Objective]] = {
        "sft": Language, "pretrain": Language, "kto": Kto, "reward": Reward,
    }  # fmt: skip
    return kinds.get(settings.name, Pairs)(settings)
