"""ZeRO-3: DeepSpeed shards parameters, gradients and optimizer states flat, one 1/W of every parameter on each rank.

The model is a skeleton whose weights are read from the files one at a time and cut at once, so no rank ever holds a whole model.
The configuration is written out from the plan: DeepSpeed's defaults clip gradients at 1, leave small matrices whole, replace a
client's optimizer, and compile C++ at run time. Nothing is compiled here: torch's AdamW steps, gloo or NCCL communicate.

Modules hold the compute dtype and the optimizer an fp32 copy of what this rank keeps of it. Loss scaling and the learning rate are the
loop's; clipping is told to DeepSpeed before each step, from the norm that the loop has seen.

Left out: reading the weights (zero3_read.py), checkpoints (zero3_states.py), 8-bit states and LLM.int8 (launcher/cells.py says why),
DeepSpeed's schedulers, NVMe.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import zero3_states
from .layouts import Layout, LayoutError, MakeOptimizer
from .memory_constants import CONSTANTS as C

if TYPE_CHECKING:
    from ..launcher.plan import Chosen
    from .prepare import Prepared

COMPUTE = {"bf16-mixed": torch.bfloat16, "fp32": torch.float32}


def settings(chosen: Chosen, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with every default that would change the training named. Bucket sizes in elements."""
    gpu = chosen.device == "cuda"
    host = {"device": "cpu", "pin_memory": gpu}
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": C["zero_bucket_elements"],
        "sub_group_size": C["zero3_sub_group_elements"],
        "stage3_prefetch_bucket_size": C["zero3_prefetch_elements"],
        "stage3_max_live_parameters": C["zero3_max_live_elements"],
        "stage3_max_reuse_distance": C["zero3_max_live_elements"],
        "stage3_param_persistence_threshold": 2 * hidden_size,  # norms and biases stay whole; no matrix does
        "stage3_gather_16bit_weights_on_model_save": True,  # else DeepSpeed's own save writes nothing and does not say so
    }
    if chosen.offload != "none":
        zero["offload_optimizer"] = host
    if chosen.offload == "params":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "train_batch_size": chosen.micro_batch * chosen.accumulation * chosen.ranks,
        "gradient_clipping": 0.0,  # unset it would be 1.0; `clip` below sets it for each step
        "bf16": {"enabled": chosen.precision == "bf16-mixed"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, made by us
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are stepped by it too; DeepSpeed's own is compiled
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def zero3(prepared: Prepared, chosen: Chosen, device: torch.device, make_optimizer: MakeOptimizer) -> Layout:
    """Reads and cuts the skeleton of `prepared`, counts, and starts DeepSpeed's engine. Collective.

    Raises LayoutError when this rank keeps more than its share.
    """
    deepspeed = begin(device)
    inside = prepared.model
    config = settings(chosen, inside.config.hidden_size)
    dtype = COMPUTE[chosen.precision]
    cut = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)
    assert prepared.fill is not None
    prepared.fill(inside, lambda parameter: cut._convert_to_zero_parameters([parameter]))
    optimizer = make_optimizer(inside)
    engine, *_ = deepspeed.initialize(model=inside, optimizer=optimizer, config=config, dist_init_required=False)
    local, whole = count(inside, chosen.ranks, 2 * inside.config.hidden_size)
    states = engine.optimizer
    return Layout(
        name="zero3",
        model=engine,
        inside=inside,
        optimizer=optimizer,
        autocast=False,
        together=True,
        local_bytes=local,
        whole_bytes=whole,
        accumulating=partial(accumulating, engine),
        backward=lambda loss: engine.backward(loss, scale_wrt_gas=False),
        clip=partial(clip, states),
        step=engine.step,
        save=partial(zero3_states.save, inside, states),
        load=partial(zero3_states.load, inside, states),
        whole=partial(whole_tensors, inside),
        rest=states._partition_all_parameters,  # else up to stage3_max_live_parameters stay whole for the next forward
        discard=partial(discard, states),
        allocates=False,
    )


def begin(device: torch.device) -> Any:
    """DeepSpeed over the process group that there is. Its shared-memory collectives for CPUs would be compiled now, for a minute,
    or fail where there is no compiler; gloo does the work."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # one process, started without a rendezvous
        dist.init_process_group("gloo" if device.type == "cpu" else None, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks the environment for it
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, dist_init_required=False)
    return deepspeed


def count(model: torch.nn.Module, ranks: int, small: int) -> tuple[int, int]:
    """(bytes of parameters on this rank, bytes of the same whole). Parameters of at most `small` elements stay whole beside their cut.

    Raises LayoutError, with the largest offenders, when a larger one is not cut.
    """
    local = whole = 0
    wrong: list[tuple[int, str]] = []
    p: Any  # a parameter as DeepSpeed leaves it
    for name, p in model.named_parameters():
        width = p.element_size()
        # Its piece, and what is gathered now, or will be from the first step on and stay so.
        here = p.ds_tensor.numel() + (p.ds_numel if p.ds_persist else p.numel())
        if p.ds_numel > small and here > -(-p.ds_numel // ranks):
            wrong.append((here * width, name))
        local, whole = local + here * width, whole + p.ds_numel * width
    if wrong:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in sorted(wrong, reverse=True)[:3])
        raise LayoutError(
            f"{len(wrong)} parameters are not sharded over {ranks} ranks: {largest}. This rank holds {local / 2**20:.1f} MiB of "
            f"{whole / 2**20:.1f}, and the plan counts on {whole / ranks / 2**20:.1f}."
        )
    return local, whole


@contextlib.contextmanager
def accumulating(engine: Any, last: bool) -> Iterator[None]:
    """Gradients are reduced in every micro-batch (each rank keeps its piece); the last one ends the step."""
    engine.set_gradient_accumulation_boundary(last)
    yield


def clip(states: Any, limit: float) -> float:
    """Norm of the whole gradient; DeepSpeed scales by it in the step that follows, as torch would: limit / (norm + 1e-6)."""
    from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

    states.clip_grad = limit
    return float(combine_grad_norm_groups(states._get_norm_groups()))


def discard(states: Any) -> None:
    """What DeepSpeed does with the gradients of a step that it skips."""
    states.zero_grad(set_to_none=True)
    if states.offload_optimizer:
        states.reset_cpu_buffers()
    else:
        states.averaged_gradients = {}


def whole_tensors(model: torch.nn.Module, name_ok: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    import deepspeed

    for name, tensor in model.state_dict(keep_vars=True).items():
        if name_ok(name):
            with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                found = tensor.detach().clone()
            yield name, found
