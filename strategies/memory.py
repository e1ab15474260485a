"""First formula; see the next commit for the derivation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .memory_request import SHARDED, MemoryRequest, ModelDims

__all__ = ["MemoryEstimate", "MemoryRequest", "ModelDims", "estimate"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one GPU (`host_bytes`: of one node). `phases` holds the allocated peak of load, forward_backward,
    optimizer_step and checkpoint_save; `components` the parts of `process_bytes` at the highest of them."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    process_bytes: int
    host_bytes: int
    phases: dict[str, int]
    components: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The object that `estimate --json` prints, in GiB."""
        gib = lambda value: round(value / GIB, 4)  # noqa: E731
        return {
            "peak_allocated_gib": gib(self.peak_allocated_bytes),
            "peak_reserved_gib": gib(self.peak_reserved_bytes),
            "process_gib": gib(self.process_bytes),
            "host_gib": gib(self.host_bytes),
            "phases": {name: gib(value) for name, value in self.phases.items()},
            "components": {name: gib(value) for name, value in self.components.items()},
        }


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """Peak memory of one GPU and of one node for `request`."""
    r, m = request, request.model
    n = r.shards if r.parallel in SHARDED else 1
    narrow = 4 if r.precision == "fp32" else 2
    linear = m.num_layers * m.block_linear_params
    other = m.total_params - linear
    base_width = {"qlora": 0.516 if r.double_quant in (None, True) else 0.5625, "lora8": 1.0}.get(r.method, narrow)
    shapes = m.linear_shapes
    adapter = 0
    if r.lora_r:
        adapter = sum(
            (sum(shapes[t]) * (1 if t == "lm_head" else m.num_layers)) * r.lora_r for t in r.lora_targets or ()
        )
    trainable = adapter if r.adapters else m.total_params
    wide = 4 if r.precision in ("bf16-mixed", "fp16-mixed", "fp32") else 2
    grad_width = wide if r.parallel in ("none", "ddp", "fsdp1", "fsdp2") else 2
    state_width = {"adamw-8bit": 2, "paged-adamw-8bit": 2, "sgd": 0}.get(r.optimizer, 2 * wide)
    weights = int(linear * base_width + other * narrow) if r.adapters else m.total_params * wide
    weights = weights // n
    if r.adapters:
        weights += adapter * wide // n
    states, grads = trainable * state_width // n, trainable * grad_width // n
    foreach = trainable * wide // n if r.optimizer == "adamw-foreach" else 0
    unit = 2 * m.hidden_size
    boundary = r.tokens * m.num_layers * unit
    q, kv, f = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.intermediate_size
    block = r.tokens * 2 * (3 * m.hidden_size + 2 * q + 2 * kv + 7 * f)
    if r.checkpointing != "full":
        block += m.num_layers * r.tokens * 2 * (10 * m.hidden_size + 4 * f + 2 * kv)
    per_logit = {"none": 12.4, "ce": 8.1, "fused": 0, "chunked-ce": 0, "trebuchet": 0}[r.kernels]
    logits = int(r.tokens * m.vocab_size * per_logit)
    gathered = 0
    if n > 1:
        gathered = (m.embedding_params + m.head_params) * 2 + int(2 * m.block_params * base_width)
    slack = 64 << 20
    if r.offload != "none":
        states = foreach = 0
    static = weights + states + slack
    phases = {
        "load": weights + gathered + slack,
        "forward_backward": static + grads + boundary + max(block, logits) + gathered,
        "optimizer_step": static + grads + foreach,
        "checkpoint_save": static + gathered,
    }
    peak = max(phases.values())
    context = 800 << 20
    reserved = int(peak * 1.08)
    parts = {
        "weights": weights,
        "gradients": grads,
        "optimizer": states + foreach,
        "activations": boundary + block,
        "logits": logits,
        "gathered": gathered,
        "allocator": reserved - peak,
        "context": context,
    }
    host = (trainable * 12 if r.offload != "none" else 0) + (4 << 30) * r.local_ranks
    return MemoryEstimate(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        process_bytes=reserved + context,
        host_bytes=host,
        phases=phases,
        components=parts,
    )
