"""What adapters of a skeleton start from: the values that PEFT draws in one process from the same seed, each rank its own rows.

Left out: making them (prepare.py), and reading the base (streaming.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .shards import own_rows


def start_adapters(core: Any, seed: int) -> None:
    """A as PEFT starts it in one process from the same seed (Kaiming uniform, in the dtype of the base), B zero; each rank keeps its
    rows. PEFT itself would put them on the meta device of their base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in adapted(core):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            first = torch.nn.Linear(a.shape[1], a.shape[0], bias=False).weight  # the constructors draw, too
            torch.nn.Linear(b.shape[1], b.shape[0], bias=False)
            torch.nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            whole = module.get_param() if hasattr(module, "parameter_name") else module.base_layer.weight
            base = getattr(module.base_layer, "compute_dtype", whole.dtype)
            rows, start = own_rows(a)
            rows.copy_(first.to(base)[start : start + len(rows)])
            own_rows(b)[0].zero_()


def adapted(core: Any) -> list[Any]:
    """Layers with adapters in the order in which PEFT makes them: modules first, then bare parameters (experts, routers), of which
    several of one module are wrapped one around the other, the first innermost."""
    layers = [
        m
        for m in core.modules()
        if isinstance(getattr(m, "lora_A", None), torch.nn.ModuleDict) and "default" in m.lora_A
    ]
    wrappers: list[Any] = []
    for layer in layers:
        if hasattr(layer, "parameter_name"):
            around = next((i for i, outer in enumerate(wrappers) if outer.base_layer is layer), len(wrappers))
            wrappers.insert(around, layer)
    return [layer for layer in layers if not hasattr(layer, "parameter_name")] + wrappers


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
