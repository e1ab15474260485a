"""What one candidate is, and what it costs: memory, speed, hours, price; by the formulas of `strategies/`.

The choice between candidates is the planner's. Left out: a prediction of speed on CPUs, where the formulas have no figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, cast

from ..strategies import throughput
from ..strategies.memory import MemoryEstimate
from ..strategies.memory_request import LINEARS, MemoryRequest, ModelDims
from .cluster import NodeGroup
from .model_families import CAPPED, NO_SDPA
from .model_spec import ModelSpec
from .plan import GIB, NOT_TIMED, Chosen, Memory, Time
from .schema import TrainConfig

# Python, torch and transformers resident before the first tensor (measured: 0.55 GiB with torch 2.13, CPU build).
CPU_PROCESS_GIB = 0.6
# Families whose routers cast their weights back to the dtype of the hidden states (read in transformers 5.23); others stay in fp32.
ROUTING_16BIT = ("qwen2_moe", "qwen3_moe", "olmoe")


@dataclass(frozen=True)
class Layout:
    """How one method is spread: `replicate` copies of `shard` pieces."""

    parallel: Literal["none", "ddp", "fsdp2", "zero3"]
    offload: Literal["none", "optimizer", "params"]
    replicate: int
    shard: int


@dataclass(frozen=True)
class Hardware:
    """One kind of rank: where it runs, how many there are, what one may use."""

    device: Literal["cpu", "cuda"]
    ranks: int
    ranks_per_node: int
    usable_gib: float
    host_gib: float
    group: NodeGroup


def request(
    config: TrainConfig,
    model: ModelSpec,
    hardware: Hardware,
    method: str,
    layout: Layout,
    checkpointing: str,
    micro: int,
) -> MemoryRequest:
    """The candidate in the terms of the memory and throughput formulas."""
    return MemoryRequest(
        model=dims(model),
        method="lora8" if quantized(config, method) == "int8" else method,
        double_quant=config.strategy.quant.double if quantized(config, method) == "nf4" else None,
        objective={"pretrain": "sft"}.get(config.objective.name, config.objective.name),
        reference=config.objective.reference_for(method) or "auto",
        lora_r=None if method == "full" else config.strategy.lora.r,
        lora_targets=None if method == "full" else targets(config),
        lora_dropout=config.strategy.lora.dropout,
        precision=precision(config, hardware),
        optimizer=optimizer(config).removesuffix("-kernel"),  # the same states, another step
        parallel=layout.parallel,
        gpus=hardware.ranks,
        dp_replicate=layout.replicate if layout.parallel != "ddp" else 1,
        gpus_per_node=hardware.ranks_per_node,
        offload=layout.offload,
        seq_len=config.data.max_length,
        micro_batch=micro,
        packed=config.data.packing,
        checkpointing=checkpointing,
        attention={"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash"}[attention(config, model)],
        # Adapters on an 8-bit base run as PEFT's own modules; norms, SwiGLU and the loss are the kernel layer's.
        kernels="none"
        if config.strategy.kernels == "off"
        else "fused"
        if quantized(config, method) == "int8"
        else "trebuchet",
        grad_accum=accumulate(config, hardware, micro),
    )


def needs(hardware: Hardware, peak_bytes: int, process_bytes: int, host_bytes: int) -> tuple[float, float]:
    """GiB that (one rank, one node's host memory) must hold. On a CPU everything is host memory, and there is neither a CUDA
    context nor a caching allocator: tensors and the interpreter."""
    if hardware.device == "cpu":
        process = peak_bytes / GIB + CPU_PROCESS_GIB
        return round(process, 3), round(process * hardware.ranks_per_node, 3)
    return round(process_bytes / GIB, 3), round(host_bytes / GIB, 3)


def memory(hardware: Hardware, found: MemoryEstimate) -> Memory:
    """What the formula found, as a plan says it."""
    process, host = needs(hardware, found.peak_allocated_bytes, found.process_bytes, found.host_bytes)
    return Memory(
        peak_allocated_gib=round(found.peak_allocated_bytes / GIB, 3),
        process_gib=process,
        usable_gib=hardware.usable_gib,
        host_gib=host,
        components={name: round(value / GIB, 3) for name, value in found.components.items()},
        phases={name: round(value / GIB, 3) for name, value in found.phases.items()},
    )


def cost_and_time(
    config: TrainConfig, model: ModelSpec, hardware: Hardware, chosen: Chosen, tokens: int | None
) -> tuple[Time, float | None]:
    """Predicted speed, hours and price of the whole run; hours and price None where the tokens are not known.

    `tokens` is one pass over the training data. The range spans published utilisations of the same hardware; the first real
    steps replace it.
    """
    group = hardware.group
    peak = group.peak_tflops.get({"bf16-mixed": "bf16", "fp16-mixed": "fp16", "fp32": "fp32"}[chosen.precision])
    if hardware.device == "cpu" or not peak:
        return NOT_TIMED, None
    layout = Layout(chosen.parallel, chosen.offload, chosen.dp_replicate, chosen.dp_shard)
    asked = request(config, model, hardware, chosen.method, layout, chosen.checkpointing, chosen.micro_batch)
    giga = lambda value: value * 1e9 if value else None  # noqa: E731
    found = throughput.estimate(
        asked,
        throughput.Hardware(
            peak_flops=peak * 1e12,
            memory_bandwidth=giga(group.memory_bandwidth_gbps),
            intra_node_bandwidth=giga(group.intra_node_gbps),
            inter_node_bandwidth=giga(group.inter_node_gbps),
        ),
    )
    low, high = found.tokens_per_s_range
    total = total_tokens(config, tokens)
    hours = total / found.tokens_per_s / 3600 if total else None
    price = (
        hours * hardware.ranks * group.price_per_gpu_hour if hours and group.price_per_gpu_hour is not None else None
    )
    time = Time(
        tokens_per_s=round(found.tokens_per_s, 1),
        tokens_per_s_range=(round(low, 1), round(high, 1)),
        hours=None if hours is None else round(hours, 3),
        hours_range=None if total is None else (round(total / high / 3600, 3), round(total / low / 3600, 3)),
    )
    return time, None if price is None else round(price, 2)


def total_tokens(config: TrainConfig, tokens: int | None) -> int | None:
    """Tokens that the run sees. With `max_steps` and packing the rows are full; else it follows from one pass over the data."""
    steps = config.optimization.max_steps
    if steps is not None:
        rows = steps * config.optimization.global_batch_size * (2 if config.objective.pairs else 1)
        full = rows * config.data.max_length
        return full if config.data.packing else None
    return None if tokens is None else round(tokens * config.optimization.epochs)


def accumulate(config: TrainConfig, hardware: Hardware, micro: int) -> int:
    return -(-config.optimization.global_batch_size // (micro * hardware.ranks))


def precision(config: TrainConfig, hardware: Hardware) -> Literal["bf16-mixed", "fp16-mixed", "fp32"]:
    wanted = config.model.dtype
    if wanted == "auto":
        wanted = "bf16" if hardware.group.supports("bf16") else "fp16" if hardware.group.supports("fp16") else "fp32"
    return cast(Literal["bf16-mixed", "fp16-mixed", "fp32"], "fp32" if wanted == "fp32" else f"{wanted}-mixed")


def attention(config: TrainConfig, model: ModelSpec) -> Literal["sdpa", "eager", "flash_attention_2"]:
    if config.model.attention != "auto":
        return config.model.attention
    return "eager" if model.model_type in NO_SDPA else "sdpa"


def quantized(config: TrainConfig, method: str) -> Literal["nf4", "int8"] | None:
    """How the frozen base is stored, None where it is not quantized."""
    return config.strategy.quant.type if method == "qlora" else None


def optimizer(config: TrainConfig) -> Literal["adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit"]:
    return "adamw" if config.optimization.optimizer == "auto" else config.optimization.optimizer


def targets(config: TrainConfig) -> tuple[str, ...]:
    """Names of projections for the memory formula; names it does not know are counted as all of them."""
    wanted = config.strategy.lora.targets
    names = LINEARS if isinstance(wanted, str) else tuple(t.removesuffix("_proj") for t in wanted)
    return names if set(names) <= {*LINEARS, "lm_head"} else LINEARS


def dims(model: ModelSpec) -> ModelDims:
    """The sizes that the formulas read. One object per model: it keeps the counts that thousands of candidates share."""
    kind = model.model_type
    return _dims(*_sizes(model), model.expert_params > 0, kind in ROUTING_16BIT, kind in CAPPED)


@lru_cache(maxsize=64)
def _dims(*sizes: Any) -> ModelDims:
    return ModelDims(**dict(zip((*_SIZES, "fused_experts", "routing_16bit", "capped_scores"), sizes, strict=True)))


_SIZES = (
    "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
    "tie_word_embeddings", "num_experts", "experts_per_token", "params",
)  # fmt: skip
_sizes = attrgetter(*_SIZES)
