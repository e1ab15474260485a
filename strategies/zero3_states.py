"""Checkpoints under ZeRO-3: each rank's pieces in a safetensors file, read back by any number of ranks.

    zero3-R-of-W.safetensors    what rank R keeps of each trained parameter: fp32, flat; its moments under `PARAMETER/STATE`

A rank of another world size reads the pieces that make up its own. Nothing is pickled, and no conversion stands between.
DeepSpeed's own universal checkpoints hold no frozen weights and restore none, silently; here those always come from the base's files.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from .layouts import LayoutError

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(model: torch.nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(model: torch.nn.Module, states: Any, folder: Path, background: bool) -> Future[None] | None:
    """This rank's file. Collective only in that every rank writes its own."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    found: dict[str, torch.Tensor] = {}
    steps = {float(state["step"]) for state in states.optimizer.state.values()}
    for name, p in trained(model).items():
        found[name] = safe_get_local_fp32_param(p).detach().cpu().clone()
        for key in MOMENTS if steps else ():
            found[f"{name}/{key}"] = safe_get_local_optimizer_state(p, key).detach().cpu().clone()
    rank, world = dist.get_rank(), dist.get_world_size()
    about = {"step": str(max(steps, default=0.0))}
    save_file(found, folder / f"zero3-{rank}-of-{world}.safetensors", metadata=about)
    return None


def load(model: torch.nn.Module, states: Any, folder: Path) -> None:
    """Fills what this rank keeps from the files of any number of ranks. Collective.

    Raises LayoutError when another layout wrote them, ValueError when they hold other parameters than the model trains, or pieces of
    other sizes.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if not (there := files(folder)):
        raise LayoutError(f"{folder} was not written under ZeRO-3; resume with the strategy.parallel that wrote it.")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in there]
        step = float(opened[0].metadata()["step"])
        held, wanted = {name for name in opened[0].keys() if "/" not in name}, trained(model)  # noqa: SIM118
        if held != set(wanted):
            raise ValueError(f"{folder} holds other parameters than this model: {sorted(held ^ set(wanted))[:3]} …")
        if step:
            make_states(states, step)
        for name, p in wanted.items():
            safe_set_local_fp32_param(p, piece(opened, name, p))
            for key in MOMENTS if step else ():
                safe_set_local_optimizer_state(p, piece(opened, f"{name}/{key}", p), key)
    states._partition_all_parameters()
    for group in range(len(states.fp16_groups)):  # the compute dtype from the fp32 copy
        states._reassign_or_swap_out_partitioned_parameters(group)
    states._post_step([])  # gathers again what stays whole


def files(folder: Path) -> list[Path]:
    """By rank."""
    return sorted(folder.glob("zero3-*-of-*.safetensors"), key=lambda file: int(file.name.split("-")[1]))


def make_states(states: Any, step: float) -> None:
    """AdamW's states as its first step would make them, for `load` to fill."""
    for flat in states.fp32_partitioned_groups_flat:
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        states.optimizer.state[flat] = {
            "step": torch.tensor(step, dtype=torch.float32, device=_step_device(states, flat))
        }
        states.optimizer.state[flat] |= zeros


def _step_device(states: Any, flat: torch.Tensor) -> torch.device:
    """torch's fused AdamW counts on the parameter's device."""
    fused = any(group.get("fused") for group in states.optimizer.param_groups)
    return flat.device if fused else torch.device("cpu")


def piece(opened: list[Any], name: str, p: Any) -> torch.Tensor:
    """The flat piece of this rank, [ds_tensor's elements] fp32, zeros behind the parameter's end."""
    size, total = p.ds_tensor.numel(), p.ds_numel
    out = torch.zeros(size, dtype=torch.float32, device=p.ds_tensor.device)
    first = dist.get_rank() * size
    at = 0
    for file in opened:
        found = file.get_slice(name)
        (length,) = found.get_shape()
        begin, end = max(first, at), min(first + size, at + length, total)
        if begin < end:
            out[begin - first : end - first] = found[begin - at : end - at].to(out.device)
        at += length
    if at < total:
        raise ValueError(
            f"the files hold {at} of {total} elements of {name}; one of them is missing or of another model"
        )
    return out
