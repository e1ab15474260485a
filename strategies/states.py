"""What a layout without shards writes into a checkpoint and reads back: trained weights and optimizer states, in safetensors.

    trainable.safetensors    what is trained, by parameter name; the frozen base is not copied
    optimizer.safetensors    `PARAMETER/STATE` -> tensor

Left out: the folder around them, its manifest and its atomic rename (training/checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

TRAINABLE, OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"


Tensors = dict[str, torch.Tensor]


def save(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    write(folder, trainable(model), optimizer_tensors(model, optimizer))


def write(folder: Path, weights: Tensors, states: Tensors) -> None:
    save_file(weights, folder / TRAINABLE)
    save_file(states, folder / OPTIMIZER)


def copy(model: torch.nn.Module, optimizer: Optimizer) -> tuple[Tensors, Tensors]:
    """What `save` would write now, in host memory of its own."""
    both = (trainable(model), optimizer_tensors(model, optimizer))
    weights, states = ({n: t.to("cpu", copy=True) for n, t in tensors.items()} for tensors in both)
    return weights, states


def load(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Fills model and optimizer. Raises ValueError when the files hold other parameters than the model trains."""
    stored = load_file(folder / TRAINABLE)
    wanted = trainable(model)
    if stored.keys() != wanted.keys():
        raise ValueError(
            f"{folder} holds other parameters than this model: {sorted(stored.keys() ^ wanted.keys())[:3]} …"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])
    _load_optimizer(model, optimizer, load_file(folder / OPTIMIZER))


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`PARAMETER/STATE` -> tensor, so that the file does not depend on the order of parameter groups."""
    out: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            # bitsandbytes shares its code tables between parameters; safetensors wants memory of its own for each.
            out[f"{name}/{key}"] = tensor.detach().clone() if key.startswith("qmap") else tensor.detach().contiguous()
    return out


def _load_optimizer(model: torch.nn.Module, optimizer: Optimizer, stored: dict[str, torch.Tensor]) -> None:
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        parameter_name, _, key = name.rpartition("/")
        by_name.setdefault(parameter_name, {})[key] = tensor
    for name, parameter in model.named_parameters():
        if name not in by_name:
            continue
        # bitsandbytes keeps its step as a plain int and everything else, like torch, as tensors.
        whole = hasattr(optimizer, "is_paged")  # an optimizer of bitsandbytes
        optimizer.state[parameter] = {
            key: int(t) if whole and key == "step" else t if key == "step" else t.to(parameter.device)
            for key, t in by_name[name].items()
        }
