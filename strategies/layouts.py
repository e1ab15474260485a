"""How a prepared model lives on the ranks: the one seam between the loop and the layouts none, ddp, fsdp2 and zero3.

`place(prepared, chosen, …)` shards or wraps the model, makes the optimizer at the point where the layout needs it, and returns a
`Layout`: plain functions over what only the layout knows. The loop, checkpoints, evaluation and export call these and never ask
which layout it is. A new layout is one function that returns a `Layout`, and one line in `place`.

What each function promises:

- `forward in accumulating(last)`: around forward and backward of one micro-batch; `last` is the last one of the step.
- `backward(loss)`: the loop has scaled the loss by (number of ranks) / (trained tokens of the global batch), so gradients are to be
  *averaged* over ranks; the result is then the gradient of the mean loss.
- `clip(limit)`: norm of the whole gradient before clipping, equal on all ranks; clips unless limit is 0. Changes no weight.
- `step()`: one update of the optimizer, gradients dropped. The loop has found the norm finite.
- `save(folder, background)`: writes trained weights and optimizer states below `folder`; every rank calls it. With `background` the
  values of now may be written later, and a future says when they are. `load(folder)` is its inverse, also on another world size.
- `whole(name_ok)`: pairs (name in `inside`, whole tensor in host or device memory), one at a time, of parameters and persistent
  buffers for which name_ok(name); every rank must go through all of them. A caller that keeps no more than a few keeps memory flat.
- `rest()`: gives back what a forward without a backward left gathered. After it `inside` holds what the optimizer updates.

Left out: what a cell costs (memory.py), and which cells there are (launcher/planner.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import states

if TYPE_CHECKING:
    from ..launcher.plan import Chosen
    from .prepare import Prepared

MakeOptimizer = Callable[[torch.nn.Module], Optimizer]
Context = contextlib.AbstractContextManager[object]


class LayoutError(Exception):
    """A model or a checkpoint that cannot be laid out as the plan says, in a sentence for the user; the session fails with it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """See the head of this file. `local_bytes`: of parameters on this rank; `whole_bytes`: of the same parameters unsharded."""

    name: str
    model: torch.nn.Module  # what the loop calls
    inside: torch.nn.Module  # without a wrapper: names are those of one process
    optimizer: Optimizer
    autocast: bool  # whether the loop runs the forward under autocast; else the layout casts by itself
    together: bool  # whether a forward is a collective, so that every rank must make as many as the others
    local_bytes: int
    whole_bytes: int
    accumulating: Callable[[bool], Context]
    backward: Callable[[torch.Tensor], None]
    clip: Callable[[float], float]
    step: Callable[[], None]
    save: Callable[[Path, bool], Future[None] | None]
    load: Callable[[Path], None]
    whole: Callable[[Callable[[str], bool]], Iterator[tuple[str, torch.Tensor]]]
    rest: Callable[[], None]
    discard: Callable[[], None]  # drops gradients that no step has used
    allocates: bool = True  # whether the optimizer makes its states in its first step


def place(prepared: Prepared, chosen: Chosen, device: torch.device, make_optimizer: MakeOptimizer) -> Layout:
    """The layout that the plan chose, with the model of `prepared` on `device`. A collective where there are several ranks."""
    from .fsdp2 import fsdp2  # here, because they build a Layout
    from .zero3 import zero3

    kinds = {"none": replicated, "ddp": replicated, "fsdp2": fsdp2, "zero3": zero3}
    return kinds[chosen.parallel](prepared, chosen, device, make_optimizer)


def replicated(prepared: Prepared, chosen: Chosen, device: torch.device, make_optimizer: MakeOptimizer) -> Layout:
    """A whole copy on each rank: one process, or DDP."""
    inside = prepared.model
    optimizer = make_optimizer(inside)
    model = inside if chosen.parallel == "none" else _ddp(inside, device)
    size = sum(p.numel() * p.element_size() for p in inside.parameters())
    return Layout(
        name=chosen.parallel,
        model=model,
        inside=inside,
        optimizer=optimizer,
        autocast=True,
        together=False,
        local_bytes=size,
        whole_bytes=size,
        accumulating=partial(_without_sync, model),
        backward=torch.Tensor.backward,
        clip=partial(clip_gradients, inside),
        step=partial(update, optimizer),
        save=partial(_save, inside, optimizer),
        load=partial(_load, inside, optimizer),
        whole=partial(_whole, inside),
        rest=lambda: None,
        discard=partial(optimizer.zero_grad, set_to_none=True),
    )


def _ddp(model: torch.nn.Module, device: torch.device) -> DistributedDataParallel:
    # Buffers (rotary frequencies) are constants; broadcasting them would be a collective in each first forward, and a rank
    # that has no held-out rows makes none.
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)


def _without_sync(model: torch.nn.Module, last: bool) -> Context:
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def clip_gradients(model: torch.nn.Module, limit: float) -> float:
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf")))


def update(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _save(model: torch.nn.Module, optimizer: Optimizer, folder: Path, background: bool) -> Future[None] | None:
    """Rank 0 writes; all ranks hold the same."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return None
    if not background:
        states.save(folder, model, optimizer)
        return None
    copied = states.copy(model, optimizer)
    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(states.write, folder, *copied)
    pool.shutdown(wait=False)
    return future


def _load(model: torch.nn.Module, optimizer: Optimizer, folder: Path) -> None:
    if (folder / states.TRAINABLE).exists():
        states.load(folder, model, optimizer)
    else:  # written by shards
        from . import sharded_states

        sharded_states.load(folder, model, optimizer)


def _whole(model: Any, name_ok: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if name_ok(name):
            yield name, tensor.detach()
