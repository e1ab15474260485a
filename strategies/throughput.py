"""Training speed and duration by arithmetic: FLOPs, traffic, launch overhead, a stated efficiency. Torch-free.

Per token, with P the weights of matrix products that a token passes (active experts, output head, no embedding
look-up) and A those of the adapters:

    forward             2 P + 2 L q S          (causal attention: half of 4 L q S; q = heads x head_dim, S sequence)
    input gradients     2 P + 4 L q S
    weight gradients    2 P                    only of what trains: a frozen base has none, adapters cost 6 A in all
    recompute           full checkpointing repeats the blocks' forward, selective about half of it; this project's loss
                        repeats the head's product
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Korthikanti et al. 2022, arXiv 2205.05198)

A micro-batch takes max(FLOPs / (peak x efficiency) + dequantization, a launch floor a layer), plus the part of the
communication that does not hide behind it. Communication of one micro-batch and GPU, n shards of B bytes of weights:
two all-gathers of B (n - 1) / n and, where weights train, a reduce-scatter of as much; DDP twice the gradients
(Rajbhandari et al. 2020, arXiv 1910.02054). The optimizer's pass and offload traffic come once a step.

The efficiency is the uncertain number: published utilisations of the same hardware differ by a factor of two between
stacks. `tokens_per_s_range` spans them; the first real steps of a run should replace it. Left out: data loading,
evaluation, saving, stragglers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .memory_request import SHARDED, MemoryRequest
from .memory_states import adapter_params, base_linear_width, compute_width, trainable_width

TABLE: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("throughput_constants.json").read_text(encoding="utf-8")
)
C: dict[str, float] = {name: entry["value"] for name, entry in TABLE.items()}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and its links. FLOP/s dense in the compute dtype; bandwidths in bytes/s, links one way and per GPU.

    `memory_bandwidth=None` leaves out what is bound by it (dequantization, optimizer pass); a missing link with several
    GPUs means its traffic is not counted.
    """

    peak_flops: float
    memory_bandwidth: float | None = None
    intra_node_bandwidth: float | None = None
    inter_node_bandwidth: float | None = None

    def __post_init__(self) -> None:
        if not self.peak_flops > 0:
            raise ValueError(f"peak_flops must be positive, got {self.peak_flops!r}")


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Speed of the whole job in tokens/s. `model_flops_per_token` counts no recompute (the numerator of `mfu`),
    `hardware_flops_per_token` does. `seconds` splits one optimizer step of one GPU; `communication` is what shows."""

    tokens_per_s: float
    tokens_per_s_range: tuple[float, float]
    model_flops_per_token: float
    hardware_flops_per_token: float
    mfu: float
    seconds: dict[str, float]

    def hours(self, total_tokens: int) -> float:
        """Hours of training for `total_tokens`, passes over the data included."""
        return total_tokens / self.tokens_per_s / 3600

    def hours_range(self, total_tokens: int) -> tuple[float, float]:
        """(shortest, longest) hours for `total_tokens`."""
        low, high = self.tokens_per_s_range
        return total_tokens / high / 3600, total_tokens / low / 3600

    def price(self, total_tokens: int, gpus: int, per_gpu_hour: float) -> float:
        """Price of `total_tokens` on `gpus` GPUs, in the currency of `per_gpu_hour`."""
        return self.hours(total_tokens) * gpus * per_gpu_hour


def estimate(request: MemoryRequest, hardware: Hardware) -> TimeEstimate:
    """Speed of the run that `request` describes on GPUs like `hardware`; the same request as the memory estimate's."""
    model, machine = flops_per_token(request)
    tokens = request.tokens
    central, low, high = (
        _step(request, hardware, machine * tokens, C[name])
        for name in ("efficiency", "efficiency_low", "efficiency_high")
    )
    per_step = tokens * request.grad_accum * request.gpus
    speed = per_step / sum(central.values())
    return TimeEstimate(
        tokens_per_s=speed,
        tokens_per_s_range=(per_step / sum(low.values()), per_step / sum(high.values())),
        model_flops_per_token=model,
        hardware_flops_per_token=machine,
        mfu=speed * model / (request.gpus * hardware.peak_flops),
        seconds=central,
    )


def flops_per_token(r: MemoryRequest) -> tuple[float, float]:
    """(model FLOPs, FLOPs that the hardware executes) per token of one forward and backward pass."""
    m = r.model
    size = {name: i * o for name, (i, o) in m.linear_shapes.items()}
    attention_weights = size["q"] + size["k"] + size["v"] + size["o"]
    block = m.num_layers * (attention_weights + m.active_experts * (size["gate"] + size["up"] + size["down"]))
    head = size["lm_head"]
    scores = 2.0 * m.num_layers * m.num_heads * m.head_dim * r.seq_len
    weights = 0.0 if r.adapters else 2.0 * (block + head)
    adapters = 6.0 * adapter_params(r) * m.active_experts / m.experts if r.adapters else 0.0
    model = 4.0 * (block + head) + 3 * scores + weights + adapters
    share = {"none": 0.0, "selective": 0.5, "full": 1.0}[r.checkpointing]
    again = share * (2.0 * block + scores) + (2.0 * head if r.kernels == "trebuchet" else 0.0)
    forward = 2.0 * (block + head) + scores
    # The reference's pass; KTO reads each prompt with the answer to another one too, by both models. What was precomputed costs
    # one pass before the first step, which is not counted.
    compared, kept = r.objective in ("dpo", "ipo", "kto"), r.reference == "precomputed"
    passes = (1 if r.objective == "kto" else 0) + (0 if kept else 2 if r.objective == "kto" else 1 if compared else 0)
    return model + passes * forward, model + passes * forward + again


def _step(r: MemoryRequest, hw: Hardware, flops: float, efficiency: float) -> dict[str, float]:
    """Seconds of one optimizer step on one GPU, by part."""
    achieved = hw.peak_flops * efficiency * (C["reference_peak"] / hw.peak_flops) ** C["efficiency_exponent"]
    recomputes = r.checkpointing != "none"
    dequantize = 0.0
    if hw.memory_bandwidth:
        passes = 3 if recomputes else 2
        dequantize = passes * _dequantized_bytes(r) / (hw.memory_bandwidth * C["memory_efficiency"])
    floor = r.model.num_layers * C["layer_floor_s"] * (1.0 if recomputes else 0.75) * C["efficiency"] / efficiency
    compute = max(flops / achieved + dequantize, floor)
    gathered, reduced = (_transfer(r, hw, sent) for sent in _traffic(r))
    once, each = (reduced, gathered) if r.parallel in ("ddp", "zero2") else (_between_copies(r, hw), gathered + reduced)
    hidden = 1 - C["overlap"]
    return {
        "compute": r.grad_accum * compute,
        "communication": r.grad_accum * max(each - C["overlap"] * compute, hidden * each) + hidden * once,
        "optimizer": _optimizer(r, hw),
    }


def _dequantized_bytes(r: MemoryRequest) -> float:
    """Bytes read and written to expand the base once."""
    if r.method not in ("qlora", "lora8"):
        return 0.0
    cut, whole = base_linear_width(r)
    return r.model.num_layers * r.model.block_linear_params * (cut + whole + 2)


def _traffic(r: MemoryRequest) -> tuple[float, float]:
    """(bytes gathered, bytes of gradients reduced) that one GPU sends for one micro-batch."""
    m = r.model
    n = r.shards if r.parallel in SHARDED else r.gpus
    if r.parallel == "none" or n == 1:
        return 0.0, 0.0
    trained = adapter_params(r) if r.adapters else m.total_params
    part = (n - 1) / n
    if r.parallel == "ddp":
        return 0.0, 2 * part * trained * trainable_width(r)
    if r.parallel == "zero2":
        return 0.0, 2 * part * trained * 2
    width = base_linear_width(r)[0] if r.adapters else compute_width(r)
    linear = m.num_layers * m.block_linear_params
    weights = linear * width + (m.total_params - linear) * compute_width(r)
    return 2 * part * weights, part * trained * compute_width(r)


def _between_copies(r: MemoryRequest, hw: Hardware) -> float:
    """Seconds to sum the gradient shards over the copies of HSDP, once a step; each GPU's ring has its own network adapter."""
    copies = r.dp_replicate if r.parallel in SHARDED else 1
    if copies == 1:
        return 0.0
    trained = adapter_params(r) if r.adapters else r.model.total_params
    sent = 2 * (copies - 1) / copies * trained / r.shards * 4
    link = hw.inter_node_bandwidth if r.gpus > (r.gpus_per_node or 8) else hw.intra_node_bandwidth
    return sent / (link * C["link_efficiency"]) if link else 0.0


def _transfer(r: MemoryRequest, hw: Hardware, sent: float) -> float:
    """Seconds to move `sent` bytes per GPU in a collective: over the links inside the node, and, when the collective
    leaves it, over all network adapters of the node together, since what a node receives its GPUs share."""
    inside, outside = hw.intra_node_bandwidth, hw.inter_node_bandwidth
    n, local = (r.shards if r.parallel in SHARDED else r.gpus), r.gpus_per_node or 8
    seconds = sent / inside if inside else 0.0
    if n > local and outside:
        seconds = max(seconds, sent / (outside * local))
    return seconds / C["link_efficiency"]


def _optimizer(r: MemoryRequest, hw: Hardware) -> float:
    """Seconds of the optimizer: one pass over parameters, gradients and moments, or the CPU's and the bus's share."""
    trained = adapter_params(r) if r.adapters else r.model.total_params
    own = trained / (r.shards if r.parallel in (*SHARDED, "zero2") else 1)
    if r.offload != "none":
        moved = own * (2 * compute_width(r)) / C["host_link_bytes_per_s"]
        weights = r.model.total_params / r.shards * compute_width(r) if r.offload == "params" else 0.0
        stream = 2 * weights * r.grad_accum / C["host_link_bytes_per_s"]
        return own / C["cpu_adam_params_per_s"] + moved + stream
    if not hw.memory_bandwidth:
        return 0.0
    return own * 7 * trainable_width(r) / (hw.memory_bandwidth * C["memory_efficiency"])
