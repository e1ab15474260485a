"""The trained weights of a checkpoint, of any layout and any number of ranks, into a whole model in one process.

For looking at a checkpoint: evaluating it, say. A run that goes on reads its own kind (states.py, sharded_states.py, zero3_states.py),
with the optimizer's states and in shards. What each file holds is written there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from . import sharded_states, zero3_states
from .states import TRAINABLE

AT_ONCE = 2**30  # bytes of shards that are put together before they are copied
Named = Mapping[str, torch.Tensor]
Pieces = Callable[[Path, Named], Iterator[tuple[str, torch.Tensor]]]


def fill(folder: Path, named: Named) -> None:
    """Copies every trained weight of the checkpoint into the tensor of that name, of the same shape, on its device and in its dtype.
    Raises ValueError when one has no such tensor, another shape, or is not there in full; then some have been copied."""
    pieces: Pieces = _whole if (folder / TRAINABLE).exists() else _flat if any(folder.glob("zero3-*")) else _shards
    with torch.no_grad():
        for name, values in pieces(folder, named):
            target = _target(folder, named, name)
            if values.shape != target.shape:
                raise ValueError(
                    f"{name} in {folder} is {tuple(values.shape)}, and the model has {tuple(target.shape)}"
                )
            target.copy_(values)


def _target(folder: Path, named: Named, name: str) -> torch.Tensor:
    if name not in named:
        raise ValueError(f"{folder} holds {name}, and the model has no parameter of that name")
    return named[name]


def _whole(folder: Path, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(folder / TRAINABLE, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # it is no dict
            yield name, opened.get_tensor(name)


def _shards(folder: Path, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
    """FSDP2's: what is sharded has the offsets of its pieces in the files' headers."""
    reader = HuggingFaceStorageReader(str(folder))
    about: dict[str, TensorStorageMetadata] = reader.read_metadata().state_dict_metadata  # type: ignore[assignment]
    held = [name for name in sharded_states.files(folder) if "/" not in name]
    some: dict[str, torch.Tensor] = {}
    for number, name in enumerate(held, 1):
        some[name] = torch.empty(about[name].size, dtype=about[name].properties.dtype)
        if number == len(held) or sum(t.nbytes for t in some.values()) >= AT_ONCE:
            with warnings.catch_warnings():  # that there is one process, which is meant
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(some, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
            yield from some.items()
            some = {}


def _flat(folder: Path, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
    """ZeRO-3's: fp32 and flat, the last piece padded."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in zero3_states.files(folder)]
        for name in [name for name in opened[0].keys() if "/" not in name]:  # noqa: SIM118
            target = _target(folder, named, name)
            flat = torch.cat([file.get_tensor(name) for file in opened])
            if len(flat) < target.numel():
                raise ValueError(f"the files of {folder} hold {len(flat)} of {target.numel()} elements of {name}")
            yield name, flat[: target.numel()].view(target.shape)
