"""FSDP2: every parameter sharded by `fully_shard`, by hand and not through accelerate, which on a CPU would run DDP and not say so.

Units are the decoder layers, the embedding and the head (in one unit, the root's, when they are tied), and the root for the rest:
inside the forward of a unit its weights are whole, plain and local, which is all that the kernel layer asks for. `dp_replicate` > 1
shards within groups of `dp_shard` ranks and averages between them (HSDP).

What is trained whole is kept in fp32, gathered and computed in the compute dtype, and its gradients are reduced in fp32. Adapters
and their frozen base are gathered as they are stored and computed under the loop's autocast: the numbers are those of DDP.

Offload: `params` keeps shards, their gradients and the optimizer's states in host memory (CPUOffloadPolicy); FSDP2 has no way to
move the states alone. After wrapping the bytes on this rank are counted, and the run stops if a parameter was left whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from . import sharded_states
from .layouts import Layout, LayoutError, MakeOptimizer, update

if TYPE_CHECKING:
    from ..launcher.plan import Chosen
    from .prepare import Prepared

COMPUTE = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16, "fp32": torch.float32}


def fsdp2(prepared: Prepared, chosen: Chosen, device: torch.device, make_optimizer: MakeOptimizer) -> Layout:
    """Shards the skeleton of `prepared`, fills it from the files, counts, and only then makes the optimizer. Collective.

    Raises LayoutError when a parameter is not sharded.
    """
    inside = prepared.model
    core = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    mesh = mesh_of(chosen, device)
    shard(core, mesh, mixed_precision(chosen), offload_policy(chosen, device))
    assert prepared.fill is not None
    prepared.fill(inside)
    local, whole = count(inside, chosen.dp_shard)
    optimizer = make_optimizer(inside)
    return Layout(
        name="fsdp2",
        model=inside,
        inside=inside,
        optimizer=optimizer,
        autocast=chosen.method != "full",
        together=True,
        local_bytes=local,
        whole_bytes=whole,
        accumulating=lambda last: contextlib.nullcontext(),  # without a sync each rank would keep whole gradients
        backward=torch.Tensor.backward,
        clip=partial(clip, inside),
        step=partial(update, optimizer),
        save=lambda folder, background: sharded_states.save(folder, resting(inside), optimizer, background),
        load=lambda folder: sharded_states.load(folder, resting(inside), optimizer),
        whole=partial(whole_tensors, inside),
        rest=lambda: (resting(inside), None)[1],
        discard=partial(optimizer.zero_grad, set_to_none=True),
    )


def mesh_of(chosen: Chosen, device: torch.device) -> DeviceMesh:
    """[dp_shard], or [dp_replicate, dp_shard]: neighbours shard, so that gathers stay within a node."""
    if not dist.is_initialized():  # one process, started without a rendezvous
        dist.init_process_group("gloo" if device.type == "cpu" else None, store=dist.HashStore(), rank=0, world_size=1)
    if chosen.dp_replicate == 1:
        return init_device_mesh(device.type, (chosen.dp_shard,), mesh_dim_names=("dp_shard",))
    shape = (chosen.dp_replicate, chosen.dp_shard)
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def mixed_precision(chosen: Chosen) -> MixedPrecisionPolicy:
    """Outputs are not cast: losses leave the head in fp32."""
    dtype = COMPUTE[chosen.precision] if chosen.method == "full" else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def offload_policy(chosen: Chosen, device: torch.device) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if chosen.offload == "params" else OffloadPolicy()


def shard(core: Any, mesh: DeviceMesh, precision: MixedPrecisionPolicy, offload: OffloadPolicy) -> None:
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for unit in units(core):
        fully_shard(unit, **options)
    fully_shard(core, **options)


def units(core: Any) -> list[torch.nn.Module]:
    """Modules that are gathered one at a time, inner ones first. Raises LayoutError when the model does not name its layers."""
    names = set(core._no_split_modules or ())
    layers = [m for m in core.modules() if type(m).__name__ in names]
    if not layers:
        raise LayoutError(f"{type(core).__name__} does not say what its decoder layers are; use strategy.parallel=ddp.")
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    return layers if tied else [*layers, embedding, head]


def count(model: torch.nn.Module, shards: int) -> tuple[int, int]:
    """(bytes of parameters on this rank, bytes of the same unsharded). A shard is at most its share of the rows, rounded up to one.

    Raises LayoutError, naming the largest offenders, when this rank holds more.
    """
    local = whole = 0
    wrong: list[tuple[int, str]] = []
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        rows = parameter.shape[0] if parameter.ndim else 1
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here = mine.numel() * mine.element_size()
        if here > math.ceil(rows / shards) * (size // max(rows, 1)):
            wrong.append((here, name))
        local, whole = local + here, whole + size
    if wrong:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in sorted(wrong, reverse=True)[:3])
        raise LayoutError(
            f"{len(wrong)} parameters are not sharded over {shards} ranks: {largest}. This rank holds {local / 2**20:.1f} MiB of "
            f"{whole / 2**20:.1f}, and the plan counts on {whole / shards / 2**20:.1f}."
        )
    return local, whole


def clip(model: torch.nn.Module, limit: float) -> float:
    """The norm is that of the whole gradient: sums of squares of all shards."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def resting(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every unit resharded; a forward without a backward leaves the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def whole_tensors(model: torch.nn.Module, name_ok: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in resting(model).state_dict().items():
        if name_ok(name):
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
