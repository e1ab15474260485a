"""Loading for ZeRO-3: the skeleton's weights read from the files one at a time, whole, and cut before the next is read.

The cut is DeepSpeed's, and flat; `streaming.py` reads rows for FSDP2. Here every rank reads and quantizes everything and keeps 1/W of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..kernels.nf4_linear import NF4Linear
from . import adapter_start, streaming
from .checkpoint_names import Source


def read(
    net: Any,
    cut: Callable[[torch.nn.Parameter], None],
    *,
    folder: Path,
    sources: Mapping[str, Source],
    made: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> None:
    """Every parameter of the skeleton read, or quantized, whole on `device` and cut before the next. Parameters that were one object
    still are. Buffers go to `device`. `sources`: what of the files each tensor is made of. `made`: tensors that no file has, by name."""
    core = net.get_base_model() if hasattr(net, "get_base_model") else net
    real_ones: dict[int, torch.nn.Parameter] = {}

    def real(module: torch.nn.Module, key: str, value: torch.Tensor) -> torch.nn.Parameter:
        before = module._parameters[key]
        assert before is not None
        parameter = torch.nn.Parameter(value, requires_grad=before.requires_grad)
        module._parameters[key] = real_ones[id(before)] = real_ones[id(parameter)] = parameter
        return parameter

    with torch.no_grad(), streaming.Weights(folder, sources, made) as weights:
        for name, module in core.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            for key, parameter in list(module.named_parameters(recurse=False)):
                if adapter_start.is_adapter(f"{name}.{key}"):
                    real(module, key, torch.empty_like(parameter, device=device))
        adapter_start.start_adapters(core, seed)
        for name, module in core.named_modules():
            if isinstance(module, NF4Linear):
                both = [
                    real(module, key, torch.empty_like(getattr(module, key), device=device))
                    for key in ("weight", "absmax")
                ]
                streaming.quantize(module, weights, streaming.hub_name(f"{name}.weight"), device)
                for parameter in both:
                    cut(parameter)
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in real_ones:
                    found = weights.rows(streaming.hub_name(f"{name}.{key}"), parameter.shape, 0, len(parameter))
                    cut(real(module, key, found.to(device, dtype)))
                elif adapter_start.is_adapter(f"{name}.{key}"):
                    parameter.data = parameter.data.to(dtype)
                    cut(parameter)
                else:
                    module._parameters[key] = real_ones[id(parameter)]
