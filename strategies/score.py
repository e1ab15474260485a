"""A score head instead of the one over the vocabulary, for reward models: transformers' own sequence classification.

The model's class, and so the saved folder, is `…ForSequenceClassification` with one label. Its own forward looks for the
last token by the padding id and takes one score a row; rows of several documents need the places named, which `score_at`
does. Left out: the loss.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


def add_score_places(net: Any) -> Any:
    """Lets the model's forward take `score_at` as well, the places in the flattened batch [B * T] whose scores are wanted;
    `logits` are then those scores, one a place. Raises ValueError when the class keeps its base or head under other names."""
    if not hasattr(net, "score") or not hasattr(net, net.base_model_prefix):
        raise ValueError(
            f"{type(net).__name__} has no score head of the usual kind, so a reward model cannot be made of it"
        )
    net.forward = MethodType(_forward, net)
    return net


def _forward(self: Any, *args: Any, score_at: Tensor | None = None, **kwargs: Any) -> Any:
    if score_at is None:
        return type(self).forward(self, *args, **kwargs)
    known = {k: v for k, v in kwargs.items() if v is not None}
    hidden = getattr(self, self.base_model_prefix)(*args, **known).last_hidden_state
    scores = self.score(hidden.flatten(0, 1)[score_at]).squeeze(-1)
    return SequenceClassifierOutput(logits=scores)


def small_scores(net: Any, seed: int) -> dict[str, Tensor]:
    """What the head starts from, by the name that its file would have: the same small values on every rank and in every run;
    transformers draws it anew at each load."""
    generator = torch.Generator().manual_seed(seed)
    shape = net.score.weight.shape
    return {"score.weight": torch.empty(shape, dtype=torch.float32).normal_(0.0, 0.02, generator=generator)}
