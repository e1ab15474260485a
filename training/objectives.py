"""The loss of an objective on one micro-batch, as a sum over tokens; the loop divides by the tokens of the global batch.

One door: with the kernel layer on, the model returns per-token log-probabilities itself and the logits never exist whole; with it
off, plain transformers computes them. Labels are shifted already (labels[t] is the token after t; -100 carries no loss).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

IGNORE = -100


def token_logps(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, kernels: bool) -> torch.Tensor:
    """Log-probability of every label, fp32 [B, T], 0 where ignored. `batch`: input_ids, position_ids, labels, each [B, T]."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if kernels:
        return model(**inputs, token_labels=batch["labels"]).token_loss.logp
    logits = model(**inputs).logits
    labels = batch["labels"]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -losses.view(labels.shape)


def sft_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, kernels: bool) -> torch.Tensor:
    """-sum of log p over the trained tokens of the micro-batch; a scalar."""
    return -token_logps(model, batch, kernels=kernels).sum()


LOSSES = {"sft": sft_loss, "pretrain": sft_loss}
