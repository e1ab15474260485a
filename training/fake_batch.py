"""The rows that `plan --probe` steps on, and what an objective needs beside them: full rows, of shapes alone.

A pair is two documents of `max_length`, in one row of twice that where rows are packed, as in training/data. Left out: objectives
with a score head, and a reference that is a second model (`fake_step.refuse`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..launcher.plan import Plan
from .objectives import Objective, make
from .reference import AdaptersOff, Precomputed


def fake_batch(plan: Plan) -> dict[str, Any]:
    """One micro-batch of the longest rows. Called inside the fake world."""
    chosen, config = plan.chosen, plan.config
    assert chosen is not None
    name, length, packed = config.objective.name, config.data.max_length, config.data.packing
    documents = chosen.micro_batch * (2 if config.objective.pairs else 1)
    shape = (documents, length) if not (packed and config.objective.pairs) else (chosen.micro_batch, 2 * length)
    batch = _rows(shape, documents, positions=packed and chosen.device == "cuda")
    if name == "orpo":
        batch["compared"] = torch.ones_like(batch["labels"], dtype=torch.bool)
    if name == "kto":
        batch |= {"wanted": torch.ones(documents, dtype=torch.bool), "mismatched": dict(batch)}
    return batch


def _rows(shape: tuple[int, int], documents: int, *, positions: bool) -> dict[str, Any]:
    ids = torch.zeros(shape, dtype=torch.long)
    # Fake position ids are taken for those of packed rows, which get a mask; without them transformers makes none.
    return {
        "input_ids": ids, "labels": ids.clone(), "position_ids": ids.clone() if positions else None,
        "sizes": [ids.numel() // documents] * documents, "reference": torch.zeros(documents),
    }  # fmt: skip


def fake_objective(plan: Plan) -> Objective:
    """With the reference of the plan, where the objective has one."""
    assert plan.chosen is not None
    objective: Objective = make(plan.config.objective)
    kind = plan.config.objective.reference_for(plan.chosen.method)
    if kind is not None:
        objective.reference = AdaptersOff() if kind == "adapters_off" else Precomputed()
    return objective


def fake_sums(plan: Plan, net: nn.Module) -> Tensor:
    """The loss of one micro-batch, with the passes that an estimate or a reference takes before it."""
    objective, batch, kernels = fake_objective(plan), fake_batch(plan), plan.config.strategy.kernels != "off"
    if objective.estimates:
        with torch.no_grad():
            moved, count = objective.divergence(net, batch, kernels=kernels)
        batch["divergence"] = moved / count
    return objective(net, batch, kernels=kernels).sums.sum()
