"""Replacement forwards of norm, attention, MLP and decoder layer: the texts that `patch_match` knows, on the ops of
`functional`.

Each is bound to one module instance; what the family needs is in `module.kernel_pattern`. They differ from what they
replace in this: q, k and v (and gate, up and down) of adapted or 4-bit layers are one op; rotation is one op; the
residual add after attention is part of the next norm. Weights are read only where `patch_linear` allows it; norms and
unreadable layers are called as modules. The attention itself is the one that the model is set to.
"""

import inspect
from functools import partial

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import functional
from .patch_linear import plain, projections
from .patch_match import AnyModule


def norm_forward(self: AnyModule, hidden_states: Tensor, residual: Tensor | None = None):
    """norm(hidden), or with a residual (norm(hidden + residual), hidden + residual)."""
    p = self.kernel_pattern
    eps = getattr(self, p.eps_name)
    if residual is None:
        return functional.rms_norm(hidden_states, self.weight, eps, offset=p.offset, casting=p.casting)
    if residual.dtype == hidden_states.dtype:
        return functional.add_rms_norm(hidden_states, residual, self.weight, eps, offset=p.offset, casting=p.casting)
    # Under autocast the residual stream is fp32 and the products are not.
    total = residual + hidden_states
    return functional.rms_norm(total, self.weight, eps, offset=p.offset, casting=p.casting), total


def attention_forward(
    self: AnyModule,
    hidden_states: Tensor,
    position_embeddings=None,
    attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    p = self.kernel_pattern
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (part.view(shape) for part in _qkv(self, hidden_states))
    if p.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not p.optional_rope or self.use_rope:
        q, k = functional.rope(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    if p.sliding_window == "module":
        kwargs["sliding_window"] = self.sliding_window
    elif p.sliding_window == "config":
        kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
    if p.softcap:
        kwargs["softcap"] = self.attn_logit_softcapping
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.kernel_eager_attention)
    dropout = self.attention_dropout if self.training else 0.0
    output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _qkv(self: AnyModule, x: Tensor):
    if self.kernel_pattern.packed_qkv:
        kv = self.num_key_value_heads * self.head_dim
        return self.qkv_proj(x).split((self.config.num_attention_heads * self.head_dim, kv, kv), dim=-1)
    modules = (self.q_proj, self.k_proj, self.v_proj)
    ready = projections(modules, x)
    if ready is None or plain(ready[0]):
        return [module(x) for module in modules]
    layers, dtype = ready
    parts = functional.lora_qkv(x.to(dtype), *layers)
    return parts if torch.is_autocast_enabled(x.device.type) else [part.to(x.dtype) for part in parts]


def mlp_forward(self: AnyModule, x: Tensor) -> Tensor:
    if self.kernel_pattern.packed:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(_gated(gate, up, self.kernel_activation))
    ready = projections((self.gate_proj, self.up_proj, self.down_proj), x)
    if ready is None or any(layer.x_lora is not None for layer in ready[0]):
        return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x), self.kernel_activation))
    (gate, up, down), dtype = ready
    y = functional.lora_mlp(x.to(dtype), gate, up, down, activation=self.kernel_activation)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.swiglu(gate, up)
    return functional.geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def block_forward(self: AnyModule, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """The layer, checkpointed where transformers would: since 5.x that happens inside the class's forward, which this
    replaces.
    """
    if args:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if self.gradient_checkpointing and self.training:
        cached = {"use_cache": False, "past_key_values": None}
        kwargs |= {name: value for name, value in cached.items() if kwargs.get(name)}
        return self._gradient_checkpointing_func(partial(_block, self, **kwargs), hidden_states)
    return _block(self, hidden_states, **kwargs)


def _block(self: AnyModule, hidden_states: Tensor, **kwargs) -> Tensor:
    if hasattr(self, "ds_id") and torch.is_grad_enabled() and not hidden_states.requires_grad:
        # ZeRO-3 takes a leaf module's gradients when that of its first input arrives, so there must be one.
        hidden_states = hidden_states.detach().requires_grad_()
    p, residual = self.kernel_pattern, hidden_states
    hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)  # by position, for the same reason
    if p.sandwich:
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm(hidden_states, residual)
        return residual + self.post_feedforward_layernorm(self.mlp(hidden_states))
    if p.dropout:
        hidden_states = self.resid_attn_dropout(hidden_states)
    hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
    hidden_states = self.mlp(hidden_states)
    return residual + (self.resid_mlp_dropout(hidden_states) if p.dropout else hidden_states)


def eager_attention(module: AnyModule):
    """The family's own eager attention, which `ALL_ATTENTION_FUNCTIONS` falls back on."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
