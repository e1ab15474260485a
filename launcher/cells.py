"""Which cells of method x layout x offload x optimizer x objective x device cannot work whatever the memory, and why, in words.

The one list of them: the planner refuses by it, so that nothing that cannot run reaches a rank. Each sentence names the limit and
ends with what to choose instead. Left out: what fits (`strategies/memory.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from .costing import Hardware, Layout, optimizer, precision, quantized
from .model_families import FAMILIES, NO_SDPA
from .model_spec import ModelSpec
from .schema import TrainConfig

ON_CPU = {
    "paged-adamw-8bit": "a paged optimizer moves states between GPU and host memory, and on a CPU there is one memory; use adamw-8bit"
}


NF4_BLOCK = 64  # weights with one scale (kernels/nf4_linear.py)


def cannot(config: TrainConfig, model: ModelSpec, hardware: Hardware, method: str, layout: Layout) -> str | None:
    """Why a cell cannot work at all; None when it can."""
    return next(_reasons(config, model, hardware, method, layout), None)


def spell(layout: Layout) -> str:
    where = {"none": "one device", "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}[layout.parallel]
    return where if layout.offload == "none" else f"{where} with {layout.offload} in host memory"


def _reasons(config: TrainConfig, model: ModelSpec, hardware: Hardware, method: str, layout: Layout) -> Iterator[str]:
    name = optimizer(config)
    if hardware.device == "cpu":
        if config.model.attention == "flash_attention_2":
            yield "flash_attention_2 needs a GPU; on a CPU leave model.attention on auto"
        if name in ON_CPU:
            yield ON_CPU[name]
    yield from _layout(hardware, method, layout)
    yield from _copies(config.strategy.dp_replicate, layout)
    yield from _states(name, layout)
    yield from _reference(config.objective.reference_for(method), method, layout)
    if layout.parallel == "zero3" and precision(config, hardware) == "fp16-mixed":
        yield "the loss scale of fp16 is the loop's, and DeepSpeed keeps one of its own; use fsdp2, or bf16 where there is"
    if quantized(config, method) == "int8":
        yield from _int8(layout)
    yield from _model(config, model, method, layout)


def _layout(hardware: Hardware, method: str, layout: Layout) -> Iterator[str]:
    if layout.parallel == "none" and hardware.ranks > 1:
        yield f"parallel none is for one rank, and there are {hardware.ranks}"
    if layout.parallel == "ddp" and hardware.ranks == 1:
        yield "ddp keeps copies on several ranks in step, and there is one"
    if layout.offload != "none" and layout.parallel == "ddp":
        yield "DDP keeps everything on the GPU; offload works with fsdp2 and zero3"
    if layout.offload != "none" and layout.parallel == "none":
        yield "nothing moves to the host without a layout that does it; fsdp2 and zero3 do, also on one GPU"
    if layout.offload != "none" and hardware.device == "cpu":
        yield "on a CPU everything is in host memory already"
    if layout.offload == "optimizer" and layout.parallel == "fsdp2":
        yield "FSDP2 moves parameters and optimizer states to the host together; use offload params, or zero3"
    if layout.replicate * layout.shard != hardware.ranks:
        yield f"strategy.dp_replicate {layout.replicate} does not divide {hardware.ranks} ranks"
    if layout.offload == "optimizer" and method != "full":
        yield "adapters' optimizer states are small; there is nothing to gain from moving them to the host"


def _copies(wanted: int | str, layout: Layout) -> Iterator[str]:
    if wanted in ("auto", 1):
        return
    if layout.parallel != "fsdp2":
        yield f"strategy.dp_replicate {wanted} is a number of sharded copies, which {spell(layout)} has not; use fsdp2, or leave it on auto"
    elif layout.shard == 1:
        yield f"strategy.dp_replicate {wanted} is a copy on every rank, and nothing is left to shard; use ddp, or fewer copies"


def _model(config: TrainConfig, model: ModelSpec, method: str, layout: Layout) -> Iterator[str]:
    """What this model's layers cannot be put through."""
    if config.objective.name == "reward" and model.model_type in FAMILIES and not FAMILIES[model.model_type].score:
        yield f"transformers has no score model of the family {model.model_type}; take a base of another family"
    if config.model.attention == "sdpa" and model.model_type in NO_SDPA:
        yield (
            f"transformers has no scaled_dot_product_attention for {model.model_type}; leave model.attention on auto, which is eager "
            "there, or take flash_attention_2 where flash-attn is installed"
        )
    if method == "full":
        return
    if config.strategy.lora.dropout and any(
        one.kind != "linear" for one in model.adapted(config.strategy.lora.targets)
    ):
        yield (
            "adapters of experts and routers are added to their weights, where there is no input to drop (PEFT refuses it); set "
            "strategy.lora.dropout 0, or name the attention's layers in strategy.lora.targets"
        )
    if quantized(config, method) == "nf4" and layout.parallel in ("fsdp2", "zero3"):
        odd = next(
            (x for x in model.linears if x.kind == "linear" and x.in_features * x.out_features % NF4_BLOCK), None
        )
        if odd is not None:
            yield (
                f"{odd.name} is {odd.out_features} x {odd.in_features}, which does not divide into the {NF4_BLOCK} weights of an NF4 "
                "scale, so it cannot be sharded in 4 bit; use ddp, or lora"
            )


def _states(name: str, layout: Layout) -> Iterator[str]:
    """What an optimizer's states cannot be put through."""
    if layout.offload != "none" and name == "paged-adamw-8bit":
        yield "a paged optimizer lives in GPU memory and pages out by itself; it does not work on offloaded states"
    if layout.parallel == "zero3" and name != "adamw":
        yield f"ZeRO-3 steps one flat vector of many parameters, and the blocks of {name} would cross them; use adamw, or fsdp2"
    if layout.offload != "none" and name != "adamw":
        yield f"{name} steps where its states are, and offloaded states are on the CPU; use adamw, or no offload"


def _reference(reference: str | None, method: str, layout: Layout) -> Iterator[str]:
    if reference == "adapters_off" and method == "full":
        yield "objective.reference adapters_off needs adapters; full fine-tuning takes precomputed or copy"
    if reference == "copy" and layout.parallel in ("fsdp2", "zero3"):
        yield f"a second copy is not sharded under {layout.parallel}; set objective.reference: precomputed"


def _int8(layout: Layout) -> Iterator[str]:
    if layout.parallel in ("fsdp2", "zero3") or layout.offload != "none":
        yield (
            "LLM.int8 keeps the scales of its weights in the module that quantized them, and a shard of the bytes loses them; "
            "use strategy.quant.type nf4, or ddp"
        )
