"""What the YAMLs of several launchers have in common, however each calls it: method, batch, intervals, layout files.

Left out: single keys (`convert_keys.json`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .convert import Keys

TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "swanlab")


def positive(value: Any, default: float) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15 else default


def names_of(value: Any) -> list[str]:
    """`a,b`, or a list; empty for anything else."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list) else []


def batch(keys: Keys, micro: str, accumulation: str, gpus: int) -> None:
    """Their rows per device and step times accumulation times devices is our global batch; micro-batches are the planner's."""
    sizes = [int(positive(keys.get(key), 0)) for key in (micro, accumulation)]
    if wrong := [key for key, size in zip((micro, accumulation), sizes, strict=True) if key in keys.tree and not size]:
        for key in wrong:
            keys.note(key, "optimization.global_batch_size")
    if not any(sizes):
        return
    rows = (sizes[0] or 1) * (sizes[1] or 1) * gpus
    keys.set("optimization.global_batch_size", rows)
    for key in (micro, accumulation):
        if key in keys.tree and key not in keys.lines:
            keys.carried[key] = "optimization.global_batch_size"
    keys.note(
        micro,
        f"optimization.global_batch_size: {rows}, on {gpus} device{'s' * (gpus > 1)} (--gpus N if there were more)",
    )


def method(keys: Keys, adapter: str | None, four: str | None, eight: str | None) -> None:
    """full, lora or qlora from `adapter` (lora, qlora, full or None) and the keys of the quantization that hold."""
    quantized = [key for key in (four, eight) if key and keys.get(key)]
    if quantized and adapter is None:
        keys.note(
            quantized[0], "strategy.method: full trains the weights as they are; qlora trains adapters on 4-bit ones"
        )
        quantized = []
    if adapter == "qlora" or (adapter == "lora" and quantized):
        keys.set("strategy.method", "qlora")
        if quantized == [eight] and eight != four:
            keys.set("strategy.quant.type", "int8")
    else:
        keys.set("strategy.method", adapter or "full")
    for key in (four, eight):
        if key and key in keys.tree and key not in keys.lines:
            keys.carried[key] = "strategy.method"


def targets(keys: Keys, key: str) -> None:
    value = keys.get(key)
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if names in (["all"], ["all-linear"]):
        keys.take(key, "strategy.lora.targets", "all-linear")
    elif isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        keys.take(key, "strategy.lora.targets", list(names))
    elif value is not None:
        keys.note(key, "strategy.lora.targets: all-linear, or a list of names")


def warmup(keys: Keys, ratio: str, steps: str) -> None:
    """A number of steps wins, as it does with them."""
    if value := positive(keys.get(steps), 0):
        keys.take(steps, "optimization.warmup", value if value < 1 else int(value))
        keys.note(ratio, f"{steps} is set too, and wins")
    else:
        for key in (ratio, steps):
            if isinstance(keys.get(key), (int, float)):
                keys.take(key, "optimization.warmup", keys.get(key))


def interval(keys: Keys, strategy: str, steps: str, to: str, epochs: float) -> None:
    """`steps` (number or share) under strategy steps; under epoch once an epoch; under no never, which we do not have."""
    how = str(keys.get(strategy)).lower() if keys.get(strategy) is not None else None
    value = keys.get(steps)
    if how == "epoch":
        keys.take(strategy, to, round(min(1 / epochs, 0.999999), 6))
        keys.note(steps, f"{strategy} is epoch")
    elif how in ("no", "false"):
        keys.note(strategy, f"{to} has a smallest number, not none: 1 in the whole run is {to}: 0.99")
        keys.note(steps, f"{strategy} is no")
    elif positive(value, 0):
        keys.take(steps, to, value)
        if how == "steps":
            keys.carried[strategy] = to
    elif how == "steps":
        keys.note(strategy, f"{to}: a share of the run by default")


def precision(keys: Keys) -> None:
    """bf16, fp16 and what goes by them: auto, true, full."""
    for key, dtype in (("bf16", "bf16"), ("fp16", "fp16")):
        value = keys.get(key)
        if value in (True, "true", "full"):
            keys.take(key, "model.dtype", dtype)
        elif value == "auto":
            keys.take(key, "model.dtype", "auto")
        elif value in (False, "false"):
            keys.carried[key] = "model.dtype"


def attention(keys: Keys, key: str) -> None:
    names = {
        "flash_attention_2": "flash_attention_2",
        "flash_attn_2": "flash_attention_2",
        "fa2": "flash_attention_2",
        "sdpa": "sdpa",
        "eager": "eager",
        "disabled": "eager",
        "auto": "auto",
    }
    value = str(keys.get(key)).lower()
    if value in names:
        keys.take(key, "model.attention", names[value])
    elif keys.get(key) is not None:
        keys.note(key, "model.attention: auto takes what the device and the packing allow")


def layout(keys: Keys) -> None:
    """DeepSpeed files by their name, and FSDP's settings."""
    value = keys.get("deepspeed")
    if value is not None:
        name = str(value.get("zero_optimization", {}) if isinstance(value, Mapping) else value).lower()
        stage = value.get("zero_optimization", {}).get("stage") if isinstance(value, Mapping) else None
        if stage == 3 or any(word in name for word in ("zero3", "z3", "stage3", "stage_3")):
            keys.take("deepspeed", "strategy.parallel", "zero3")
            if "offload" in name:
                params = "offload_param" in name or "all" in name or "params" in name or isinstance(value, str)
                keys.set("strategy.offload", "params" if params else "optimizer")
            keys.note("deepspeed", "strategy.parallel: zero3; what else the file says is the planner's to choose")
        else:
            keys.note(
                "deepspeed", "strategy.parallel: auto; ZeRO 1 and 2 have no counterpart, ddp and fsdp2 are the nearest"
            )
    for key in ("fsdp", "fsdp_config", "fsdp_version"):
        if keys.get(key):
            keys.take(key, "strategy.parallel", "fsdp2")
            config = keys.get("fsdp_config")
            offload = isinstance(config, Mapping) and (
                config.get("offload_params") or config.get("fsdp_offload_params")
            )
            if offload or "offload" in str(keys.get("fsdp")):
                keys.set("strategy.offload", "params")
            keys.note(key, "strategy.parallel: fsdp2; wrapping, prefetching and state dicts are set by the layout")


def trackers(keys: Keys, names: Sequence[Any], key: str) -> None:
    known = {"comet": "comet_ml"}
    wanted = [known.get(str(name), str(name)) for name in names if str(name) not in ("none", "None")]
    good = [name for name in wanted if name in TRACKERS]
    keys.take(
        key, "tracking", [*keys.out.get("tracking", []), *(n for n in good if n not in keys.out.get("tracking", []))]
    )
    if rest := [name for name in wanted if name not in TRACKERS]:
        keys.note(key, f"tracking has {', '.join(TRACKERS)}, not {', '.join(rest)}")
