"""What sharded layouts write into a checkpoint: each rank its shards, by torch.distributed.checkpoint, in safetensors.

    shard-0000R-model-….safetensors    `PARAMETER` and `PARAMETER/STATE`, with the offsets of the shard in the file's header

The reader takes the files of any number of ranks, and those of layouts without shards (states.py), which use the same names: a run
may go on under another layout or world size. Nothing is pickled. State dicts are made here, from parameters and the optimizer:
torch's `get_state_dict` gives an optimizer that has not stepped a step of 1 (measured: later losses differ).
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from .states import OPTIMIZER, TRAINABLE, optimizer_tensors, trainable

_background: dict[str, Any] = {}  # the process group of saves in the background: their collectives meet no others


def save(folder: Path, model: torch.nn.Module, optimizer: Optimizer, background: bool) -> Future[None] | None:
    """Collective. In the background the values of now are copied first; the future of rank 0 ends after all ranks have written."""
    state: dict[str, Any] = {**trainable(model), **optimizer_tensors(model, optimizer)}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    if not background:
        dcp.save(state, storage_writer=writer)
        return None
    if "group" not in _background:
        _background["group"] = dist.new_group(backend="gloo")
    future: Any = dcp.async_save(state, storage_writer=writer, process_group=_background["group"])
    return future


def load(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Fills model and optimizer, sharded or not, from the files of any layout. Collective where there are several ranks.

    Raises ValueError when the files hold other parameters than the model trains, or in another shape or dtype.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, TensorStorageMetadata] = reader.read_metadata().state_dict_metadata  # type: ignore[assignment]
    wanted = trainable(model)
    names = {name for name in stored if "/" not in name and name in wanted}
    others = _weights_of(folder) - set(wanted)
    if missing := (set(wanted) - names) | others:
        raise ValueError(f"{folder} holds other parameters than this model: {sorted(missing)[:3]} …")
    state: dict[str, Any] = dict(wanted)
    by_parameter: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name, about in stored.items():
        parameter, slash, key = name.rpartition("/")
        if not slash:
            continue
        if not about.size:
            by_parameter[parameter][key] = _scalar(folder, name)
        else:
            like = wanted[parameter]
            dtype = about.properties.dtype
            if about.size == like.shape:
                made = torch.empty_like(like, dtype=dtype)
            else:
                made = torch.empty(about.size, dtype=dtype, device=like.device)
            by_parameter[parameter][key] = state[name] = made
    for name, target in state.items():
        if stored[name].size != target.shape or stored[name].properties.dtype != target.dtype:
            found = f"{tuple(stored[name].size)} {stored[name].properties.dtype}"
            raise ValueError(f"{name} in {folder} is {found}, and the model has {tuple(target.shape)} {target.dtype}")
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, trained in model.named_parameters():
        if by_parameter.get(name):
            optimizer.state[trained] = by_parameter[name]


def _weights_of(folder: Path) -> set[str]:
    """Names of parameters, not of states, in all files that hold some."""
    found: set[str] = set()
    for file in [*folder.glob("shard-*.safetensors"), *folder.glob(TRAINABLE)]:
        with safe_open(file, framework="pt") as opened:
            found |= {name for name in opened.keys() if "/" not in name}  # noqa: SIM118  (not a mapping)
    return found


def _scalar(folder: Path, name: str) -> torch.Tensor:
    """A tensor without dimensions, like AdamW's step: the reader of torch 2.13 takes slices only."""
    for file in [*folder.glob("shard-*.safetensors"), *folder.glob(OPTIMIZER)]:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name)
    raise ValueError(f"{folder} has lost {name}")
