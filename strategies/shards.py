"""What of a sharded parameter is on this rank, and the pieces of all ranks put together again. Left out: sharding (fsdp2.py)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(this rank's rows, number of the first) of a parameter sharded along its first dimension, or of a whole one."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local: torch.Tensor = parameter.to_local().detach()
    return local, offset[0]


def gathered(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The pieces [own rows] of all ranks that share `weight`, in order: [rows of weight]."""
    if not isinstance(weight, DTensor):
        return values
    mesh: DeviceMesh = weight.device_mesh
    group, ranks = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    most = math.ceil(weight.shape[0] / ranks)
    padded = values.new_zeros(most)
    padded[: len(values)] = values
    out = values.new_empty(most * ranks)
    dist.all_gather_single(out, padded, group=group)
    return out[: weight.shape[0]]
