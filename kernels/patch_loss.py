"""The loss as a module call: a patched causal LM takes labels and returns per-token losses, through its head's forward.

    out = model(input_ids=..., position_ids=..., use_cache=False, token_labels=labels)
    out.token_loss.logp        [B, T] fp32, 0 where the label is -100;  out.logits is None

labels [B, T] are aligned: the label at t is the token that follows t. The head computes them in its own forward,
`head(hidden, token_labels=...)`, so whatever gathers the head's weight for a forward (FSDP2's root, ZeRO-3's hooks,
PEFT's wrapper of saved modules) has gathered it. `token_entropy=True` and `token_argmax=True` fill those fields as
well. Without token_labels the model's own forward runs.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from . import functional
from .functional import TokenLoss
from .patch_documents import lengths_of, unmasked
from .patch_match import AnyModule


@dataclass
class TokenLossOutput(ModelOutput):
    """What a patched causal LM returns for token_labels. `aux_loss`: the routers' balancing loss, if the config asks
    for it.
    """

    token_loss: TokenLoss | None = None
    logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def head_forward(
    self: AnyModule, hidden_states: Tensor, token_labels: Tensor | None = None, token_entropy: bool = False,
    token_argmax: bool = False,
):  # fmt: skip
    """Logits [..., V], or with token_labels a tuple (logp, lse[, entropy][, argmax]): tensors only, for the hooks that
    look.
    """
    if token_labels is None:
        return type(self).forward(self, hidden_states)
    softcap, scale = self.kernel_logits
    loss = functional.token_loss(
        hidden_states, self.weight, token_labels, bias=self.bias, softcap=softcap, logit_scale=scale,
        return_entropy=token_entropy, return_argmax=token_argmax,
    )  # fmt: skip
    return tuple(t for t in loss if t is not None)


def causal_lm_forward(
    self: AnyModule, input_ids: Tensor | None = None, *args, token_labels: Tensor | None = None,
    token_entropy: bool = False, token_argmax: bool = False, **kwargs,
):  # fmt: skip
    """The model's forward, which also takes token_labels; see the head of this file."""
    if token_labels is not None and kwargs.get("use_cache") is None:
        kwargs["use_cache"] = (
            False  # with a cache transformers does not look for packed rows, and documents see each other
        )
    lengths, longest = _documents(self, input_ids, kwargs)
    if lengths is not None:
        kwargs["document_lengths"] = lengths
    with unmasked(longest) if longest is not None else nullcontext():
        if token_labels is None:
            return type(self).forward(self, input_ids, *args, **kwargs)
        if args or kwargs.get("labels") is not None or kwargs.get("logits_to_keep"):
            raise TypeError(
                "with token_labels, pass everything but input_ids by name, and neither labels nor logits_to_keep"
            )
        wanted: dict[str, Any] = {
            "token_labels": token_labels,
            "token_entropy": token_entropy,
            "token_argmax": token_argmax,
        }
        if self.kernel_head_name is None:
            return _from_logits(self, input_ids, kwargs, **wanted)
        return _from_hidden(self, input_ids, kwargs, wanted)


def _documents(self: AnyModule, input_ids: Tensor | None, kwargs: dict) -> tuple[list[list[int]] | None, int | None]:
    """(document lengths of packed rows, tokens of the longest); (None, None) where transformers sees to the mask."""
    if not self.kernel_by_document or torch.compiler.is_compiling() or kwargs.get("attention_mask") is not None:
        return None, None
    cached = self.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if cached or kwargs.get("past_key_values") is not None:
        return None, None
    given = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    if kwargs.get("position_ids") is None:
        # Each row is one document, whatever the values.
        return None, None if given is None else given.shape[1]
    lengths = lengths_of(kwargs["position_ids"])
    return lengths, None if lengths is None else max(max(row) for row in lengths)


def _from_hidden(self: AnyModule, input_ids: Tensor | None, kwargs: dict, wanted: dict) -> TokenLossOutput:
    for name in ("labels", "logits_to_keep", "return_dict"):
        kwargs.pop(name, None)
    router = self.kernel_pattern.router
    if router:
        asked = kwargs.pop("output_router_logits", None)
        kwargs["output_router_logits"] = self.config.output_router_logits if asked is None else asked
    outputs = self.model(input_ids=input_ids, **kwargs)
    found = getattr(self, self.kernel_head_name)(outputs.last_hidden_state, **wanted)
    aux_loss = None
    if router and kwargs["output_router_logits"]:
        aux_loss = self.kernel_balancing_loss(
            outputs.router_logits, self.num_experts, self.num_experts_per_tok, kwargs.get("attention_mask")
        )
    loss = _token_loss(found, wanted["token_entropy"], wanted["token_argmax"])
    return TokenLossOutput(token_loss=loss, aux_loss=aux_loss, hidden_states=outputs.hidden_states)


def _token_loss(found: tuple[Tensor, ...], entropy: bool, argmax: bool) -> TokenLoss:
    rest = list(found[2:])
    return TokenLoss(found[0], found[1], rest.pop(0) if entropy else None, rest.pop(0) if argmax else None)


def _from_logits(
    self: AnyModule,
    input_ids: Tensor | None,
    kwargs: dict,
    token_labels: Tensor,
    token_entropy: bool,
    token_argmax: bool,
) -> TokenLossOutput:
    """For a model or head that is not known: its own forward makes the logits, whole; the report says so."""
    outputs = type(self).forward(self, input_ids, **kwargs)
    logits = outputs.logits
    loss, lse = functional.cross_entropy(logits, token_labels)
    valid = token_labels != -100
    entropy = None
    if token_entropy:
        p = torch.softmax(logits.float(), -1)
        entropy = torch.where(valid, lse - (p * logits.float().clamp_min(torch.finfo(torch.float32).min)).sum(-1), 0.0)
    argmax = torch.where(valid, logits.argmax(-1), 0) if token_argmax else None
    return TokenLossOutput(
        token_loss=TokenLoss(-loss, lse, entropy, argmax),
        aux_loss=outputs.get("aux_loss"),
        hidden_states=outputs.hidden_states,
    )


def logit_transform(model: AnyModule) -> tuple[float | None, float]:
    """(softcap, scale) that the causal LM's pattern applies to its logits."""
    p = model.kernel_pattern
    softcap = getattr(model.config, "final_logit_softcapping", None) if p.softcap else None
    scale = 1.0
    if p.scale == "multiply":
        scale = float(model.logit_scale)
    elif p.scale == "divide":
        scale = 1.0 / float(model.config.logits_scaling)
    if not math.isfinite(scale):
        raise ValueError(f"the config scales logits by {scale}")
    return softcap, scale
