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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .layouts import LayoutError
from .states import OPTIMIZER, TRAINABLE, optimizer_tensors, trainable

_background: dict[str, Any] = {}  # the process group of saves in the background: their collectives meet no others


def save(folder: Path, model: torch.nn.Module, optimizer: Optimizer, background: bool) -> Future[None] | None:
    """Collective. In the background the values of now are copied first; the future of rank 0 ends after all ranks have written."""
    state: dict[str, Any] = to_save(model, optimizer)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    if not background:
        try:
            dcp.save(state, storage_writer=writer)
        except dcp.CheckpointException as problem:
            raise cause(problem) from None
        return None
    if "group" not in _background:
        _background["group"] = dist.new_group(backend="gloo")
    ended: Future[None] = Future()

    def end(writing: Future[Any]) -> None:
        problem = writing.exception()
        ended.set_result(None) if problem is None else ended.set_exception(cause(problem))

    saved: Any = dcp.async_save(state, storage_writer=writer, process_group=_background["group"])
    saved.add_done_callback(end)
    return ended


def cause(problem: BaseException) -> BaseException:
    """What failed on the first rank that failed: a full disk should be called that, and not the exception of a collective."""
    failures = getattr(problem, "failures", None)
    return failures[min(failures)][0] if failures else problem


def load(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Fills model and optimizer, sharded or not, from the files of any layout. Collective where there are several ranks.

    Raises ValueError when the files hold other parameters than the model trains, or in another shape or dtype; LayoutError for
    states that only as many ranks as wrote them can read.
    """
    if any(folder.glob("zero3-*")):
        raise LayoutError(
            f"{folder} was written under ZeRO-3, in pieces of another kind; resume with strategy.parallel zero3."
        )
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, TensorStorageMetadata] = reader.read_metadata().state_dict_metadata  # type: ignore[assignment]
    wanted = trainable(model)
    there = files(folder)
    held = {name for name in there if "/" not in name}
    if held != set(wanted):
        raise ValueError(f"{folder} holds other parameters than this model: {sorted(held ^ set(wanted))[:3]} …")
    state: dict[str, Any] = dict(wanted)
    states: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name, about in stored.items():
        parameter, slash, key = name.rpartition("/")
        key, own, owner = key.partition("@")
        if not slash:
            continue
        if own and owner.partition("of")[2] != _rank().partition("of")[2]:
            raise LayoutError(
                f"{folder} holds 8-bit optimizer states of {owner.partition('of')[2]} ranks, whose blocks cannot be cut for another "
                f"number; resume with cluster.processes as before, or train with optimization.optimizer adamw"
            )
        if own and owner != _rank():
            continue
        if not about.size:
            scalar = _scalar(there[name], name)
            states[parameter][key] = int(scalar) if hasattr(optimizer, "is_paged") else scalar
            continue
        like, dtype = wanted[parameter], about.properties.dtype
        if hasattr(optimizer, "is_paged") and bool(own) != isinstance(like, DTensor):
            raise LayoutError(
                f"{folder} holds 8-bit optimizer states of {'shards' if own else 'whole parameters'}, which this layout cannot cut or "
                "join; resume with strategy.parallel and cluster.processes as before, or train with optimization.optimizer adamw"
            )
        sharded = about.size == like.shape and not own
        made = (
            torch.empty_like(like, dtype=dtype) if sharded else torch.empty(about.size, dtype=dtype, device=like.device)
        )
        states[parameter][key] = state[name] = made
    for name, target in state.items():
        if stored[name].size != target.shape or stored[name].properties.dtype != target.dtype:
            found = f"{tuple(stored[name].size)} {stored[name].properties.dtype}"
            raise ValueError(f"{name} in {folder} is {found}, and the model has {tuple(target.shape)} {target.dtype}")
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, trained in model.named_parameters():
        if states.get(name):
            optimizer.state[trained] = states[name]


def to_save(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Weights and states. A state that is plain where its parameter is sharded is this rank's own and gets the rank in its name:
    torch.distributed.checkpoint takes equal names for equal values, and writes one of them."""
    weights = trainable(model)
    out = dict(weights)
    for name, tensor in optimizer_tensors(model, optimizer).items():
        own = isinstance(weights[name.rpartition("/")[0]], DTensor) and not isinstance(tensor, DTensor) and tensor.ndim
        out[f"{name}@{_rank()}" if own else name] = tensor
    return out


def _rank() -> str:
    return f"{dist.get_rank()}of{dist.get_world_size()}" if dist.is_initialized() else "0of1"


def files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> one file that holds some of it."""
    found: dict[str, Path] = {}
    for file in [*folder.glob("shard-*.safetensors"), *(folder / name for name in (TRAINABLE, OPTIMIZER))]:
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    return found


def _scalar(file: Path, name: str) -> torch.Tensor:
    """A tensor without dimensions, like AdamW's step: the reader of torch 2.13 takes slices only."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
