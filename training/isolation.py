"""Whether packed samples are apart in this model: asked of the model itself, before training, where no test of ours has asked.

transformers keeps the samples of a row apart by position ids that restart, which a model's class may ignore without a word (OPT's, in
transformers 5.23), and which a convolution or a recurrence does not know of. Here a sample stands behind one, behind another and at the
beginning: its own log-probabilities must be the same. Left out: families of the planner's table, which the tests ask
(tests/training/test_isolation.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..launcher.errors import JobFailed
from ..launcher.model_families import FAMILIES
from ..launcher.plan import Plan
from ..strategies.prepare import compute_dtype
from .data.collate import Sample, collate
from .scores import Subject, asking, of_stepper, token_scores

UNIT = 1e-9  # ranks compare whole numbers
TOKENS = 24  # of a sample: more than the width of a convolution
# What is masked is nothing, and places count from 0 in each sample, so nothing differs but for the order of sums.
BOUND = {torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def require(stepper: Any, plan: Plan, pad_id: int) -> None:
    """Collective. Raises JobFailed when the samples of a packed row see each other. Asks nothing where a test has, or nothing is packed."""
    kind, chosen = plan.model.model_type, plan.chosen
    if chosen is None or not plan.config.data.packing or kind in FAMILIES:
        return
    score = plan.config.objective.name == "reward"
    seen = largest_change(of_stepper(stepper), vocab=plan.model.vocab_size, pad_id=pad_id, score=score)
    if (
        BOUND[compute_dtype(chosen.precision)] < seen < math.inf
    ):  # what is not a number is said by the first evaluation or step
        raise JobFailed(
            f"packed samples see each other in a model of type {kind}: what it says of a sample changes by up to {seen:.2%} with its "
            "place in the row and the sample before it. Set data.packing false; each row then holds one sample."
        )


def largest_change(subject: Subject, *, vocab: int, pad_id: int, score: bool = False) -> float:
    """Largest difference of a sample's log-probabilities, or of its scores in a reward model, between three rows of two samples: behind
    one, behind another, and before the first; over the largest of them, of all ranks, and infinite where it is not a number."""
    tokens = np.random.default_rng(0).integers(vocab, size=(3, TOKENS))
    first, other = ((tokens[i], np.zeros(TOKENS, dtype=bool)) for i in (0, 1))
    asked: Sample = (tokens[2], np.ones(TOKENS, dtype=bool))
    rows = (([first, asked], TOKENS), ([other, asked], TOKENS), ([asked, first], 0))
    with asking(subject):
        one, *others = (said(subject, score, collate([row], pad_id=pad_id), start) for row, start in rows)
    change = max(float((one - two).abs().max() / one.abs().max()) for two in others)
    return subject.most(round(change / UNIT))[0] * UNIT if math.isfinite(change) else math.inf


def said(subject: Subject, score: bool, batch: Mapping[str, Any], start: int) -> torch.Tensor:
    """Of the sample at `start` of the batch's one row."""
    if not score:
        return token_scores(subject, batch)[0][:, start : start + TOKENS]
    inputs = {name: batch[name].to(subject.device) for name in ("input_ids", "position_ids")}
    at = torch.arange(start, start + TOKENS, device=subject.device)
    return subject.model(**inputs, use_cache=False, score_at=at).logits.float()
