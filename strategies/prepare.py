"""From a chosen strategy to a model that trains: load, quantize, add adapters, patch kernels. One function, steps in a stated order.

The order matters: quantization happens while loading (so the full-width weights of a layer are gone before the next one comes);
adapters wrap what is already quantized; the kernel layer looks at the modules as they will run; sharding comes last, because it
replaces parameters. Under FSDP2 the model is a skeleton until it is sharded (layouts.py), and `Prepared.fill` then reads each
rank's own rows. What a method costs in bytes is in `memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.nf4_linear import NF4Linear
from . import checkpoint_names, streaming, zero3_read

if TYPE_CHECKING:
    from ..kernels.patch import KernelReport
    from ..launcher.plan import Chosen
    from ..launcher.schema import Model, StrategyChoice

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash_attention_2"}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    model: Any  # torch.nn.Module; attributes of a Module are typed Tensor | Module, which helps nobody
    kernels: KernelReport | None
    trainable: int
    total: int
    fill: Callable[..., None] | None = None  # reads the weights of a skeleton: into shards, or cutting as it goes


def compute_dtype(precision: str) -> torch.dtype:
    return {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16, "fp32": torch.float32}[precision]


def storage_dtype(chosen: Chosen) -> torch.dtype:
    """Of the weights in memory: what is trained is fp32, what is frozen is kept in the compute dtype."""
    return torch.float32 if chosen.method == "full" else compute_dtype(chosen.precision)


def prepare(
    folder: Path,
    model: Model,
    strategy: StrategyChoice,
    chosen: Chosen,
    device: torch.device,
    seed: int,
    *,
    score: bool = False,
) -> Prepared:
    """Reads the Hugging Face folder and returns the model on `device`, ready for the loop. `score`: with a fresh score head
    in place of the one over the vocabulary (reward models).

    Raises what the libraries raise; a model that the plan let through and that does not load is a failed job, not bad input.
    """
    torch.manual_seed(seed)  # adapters start from random A matrices: the same ones on every rank
    streamed = chosen.parallel in ("fsdp2", "zero3")
    made: dict[str, torch.Tensor] = {}
    sources: dict[str, checkpoint_names.Source] = {}
    if streamed:
        net, sources = _skeleton(folder, model, strategy, chosen, score)
    else:
        net = _load(folder, model, strategy, chosen, device, score)
    if score:
        from .score import add_score_places, small_scores

        made = small_scores(add_score_places(net), seed)
        if not streamed:
            net.score.weight.data.copy_(made["score.weight"])
    net.config.use_cache = False  # with the cache on, packed samples attend to each other (transformers 5.23, measured)
    if chosen.method != "full":
        torch.manual_seed(seed)  # again: loading draws a score head, where a skeleton (streaming.py) draws nothing
        net = _adapt(net, strategy, score)
    report = _patch(net, strategy, device)
    if chosen.checkpointing != "none":
        _checkpoint_activations(net, chosen)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    reading: dict[str, Any] = {"folder": folder, "sources": sources, "made": made, "device": device, "seed": seed}
    fill: Callable[..., None] = partial(streaming.fill, **reading, offload=chosen.offload == "params")
    if chosen.parallel == "zero3":
        fill = partial(zero3_read.read, **reading, dtype=compute_dtype(chosen.precision))
    total = weights(net)
    return Prepared(model=net, kernels=report, trainable=trainable, total=total, fill=fill if streamed else None)


def prepare_frozen(
    folder: Path, model: Model, strategy: StrategyChoice, chosen: Chosen, device: torch.device
) -> torch.nn.Module:
    """The untrained model a second time, to compare with: in the compute dtype, quantized where the trained one is."""
    same = chosen if chosen.method == "qlora" else chosen.model_copy(update={"method": "lora"})
    net = _load(folder, model, strategy, same, device, False)
    net.config.use_cache = False
    _patch(net, strategy, device)
    return net


def weights(net: torch.nn.Module) -> int:
    """Weights that the parameters stand for: an NF4 one holds two in a byte, and its scales are none."""
    four_bit = [m for m in net.modules() if isinstance(m, NF4Linear)]
    packed = {id(p): m for m in four_bit for p in (m.weight, m.absmax)}
    total = sum(m.in_features * m.out_features for m in four_bit)
    for parameter in net.parameters():
        state = getattr(parameter, "quant_state", None)
        if id(parameter) not in packed:
            total += parameter.numel() if state is None else state.shape.numel()
    return total


def _skeleton(
    folder: Path, model: Model, strategy: StrategyChoice, chosen: Chosen, score: bool
) -> tuple[Any, dict[str, checkpoint_names.Source]]:
    """(the model without memory, what of the files each of its tensors is made of)."""
    attention = ATTENTION[chosen.attention]
    net = streaming.skeleton(folder, model, dtype=storage_dtype(chosen), attention=attention, score=score)
    sources = checkpoint_names.sources(net, folder)
    if chosen.method == "qlora":
        streaming.to_nf4(net, double=strategy.quant.double, compute_dtype=compute_dtype(chosen.precision))
    return net, sources


def _load(
    folder: Path, model: Model, strategy: StrategyChoice, chosen: Chosen, device: torch.device, score: bool
) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": storage_dtype(chosen), "attn_implementation": ATTENTION[chosen.attention]}
    if chosen.method == "qlora":
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if strategy.quant.type == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=strategy.quant.type,
                bnb_4bit_use_double_quant=strategy.quant.double,
                bnb_4bit_compute_dtype=compute_dtype(chosen.precision),
            )
        )
        options["device_map"] = {"": device}
    if score:
        options["num_labels"] = 1
    kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    net: Any = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=model.trust_remote_code, **options
    )
    if chosen.method == "qlora":
        _keep_training_layout(net)
        return net
    return net.to(device)


def _keep_training_layout(net: Any) -> None:
    """bitsandbytes on CPUs with AVX512-BF16 repacks a 4-bit weight for inference at the first forward in eval mode, and training
    afterwards is silently wrong (bitsandbytes 0.50.2: adapter gradients off by 0.13 of 0.14, measured). This switches it off."""
    for module in net.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _adapt(net: Any, strategy: StrategyChoice, score: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = strategy.lora
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_routers(net) or None,
        task_type="SEQ_CLS" if score else "CAUSAL_LM",  # which also trains the score head whole
    )
    made = get_peft_model(net, config)
    for parameter in made.parameters():
        if parameter.requires_grad:  # the copy of a score head comes in the dtype of the base
            parameter.data = parameter.data.float()
    return made  # adapters of a 16-bit base are fp32: updates smaller than a bf16 step survive


def _routers(net: Any) -> list[str]:
    """Names of linear layers whose own forward returns more than their product (Phi-3.5-MoE's routers): "all-linear" means them too,
    and PEFT's layer around one would fail at the first step."""
    linear = torch.nn.Linear
    own = {
        name.rpartition(".")[2]
        for name, module in net.named_modules()
        if isinstance(module, linear) and type(module).__module__.startswith("transformers.models.")
        if type(module).forward is not linear.forward
    }
    return sorted(own)


def _patch(net: Any, strategy: StrategyChoice, device: torch.device) -> KernelReport | None:
    if strategy.kernels == "off":
        return None
    from ..kernels.patch import patch

    return patch(net, device=device)


def _checkpoint_activations(net: Any, chosen: Chosen) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if chosen.checkpointing == "selective":
        options["context_fn"] = _selective_contexts
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _selective_contexts() -> Any:
    """Per operation: attention and every second matrix product are kept, the rest is computed again in backward."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten, seen = torch.ops.aten, {True: 0, False: 0}
    products = {aten.mm.default, aten.addmm.default, aten.linear.default}
    if hasattr(torch.ops.trebuchet, "lora_project"):  # the kernel layer's product with adapters, one op to this policy
        products.add(torch.ops.trebuchet.lora_project.default)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if "scaled_dot_product" in str(op):
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            seen[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
