"""ZeRO-3: DeepSpeed shards parameters, gradients and optimizer states flat, one 1/W of every parameter on each rank.

The model is a skeleton whose weights are read from the files one at a time and cut at once, so no rank ever holds a whole model.
The configuration is written out from the plan: DeepSpeed's defaults clip gradients at 1, leave small matrices whole, replace a
client's optimizer, and compile C++ at run time. Nothing is compiled here: torch's AdamW steps, gloo or NCCL communicate.

Modules hold the compute dtype and the optimizer an fp32 copy of what this rank keeps of it. Loss scaling and the learning rate are the
loop's; clipping is told to DeepSpeed before each step, from the norm that the loop has seen.

Checkpoints, `zero3-R-of-W.safetensors`: what rank R keeps of each trained parameter, as fp32 and flat, and of its two moments under
`PARAMETER/STATE`. A rank of another world size reads the pieces that make up its own. Nothing is pickled. DeepSpeed's own universal
checkpoints hold no frozen weights and restore none, silently; here those always come from the base's files.

Left out: 8-bit states and LLM.int8 (launcher/cells.py says why), DeepSpeed's schedulers, NVMe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer

from ..kernels.nf4_linear import NF4Linear
from ..launcher.errors import JobFailed
from . import streaming
from .layouts import Layout, MakeOptimizer
from .memory_constants import CONSTANTS as C

if TYPE_CHECKING:
    from ..launcher.plan import Chosen
    from .prepare import Prepared

COMPUTE = {"bf16-mixed": torch.bfloat16, "fp32": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")


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

    Raises JobFailed when this rank keeps more than its share.
    """
    deepspeed = begin(device)
    inside = prepared.model
    config = settings(chosen, inside.config.hidden_size)
    dtype = COMPUTE[chosen.precision]
    cut = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)
    assert prepared.source is not None
    folder, seed = prepared.source
    read(inside, folder, dtype, device, seed, lambda parameter: cut._convert_to_zero_parameters([parameter]))
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
        save=partial(save, inside, states),
        load=partial(load, inside, states),
        whole=partial(whole_tensors, inside),
        rest=lambda: None,
        discard=partial(discard, states),
        allocates=False,
    )


def begin(device: torch.device) -> Any:
    """DeepSpeed over the process group that there is. Its shared-memory collectives for CPUs would be compiled now, for a minute,
    or fail where there is no compiler; gloo does the work."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # one process, started without a rendezvous
        dist.init_process_group("gloo" if device.type == "cpu" else None, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, dist_init_required=False)
    return deepspeed


def read(
    net: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    cut: Callable[[torch.nn.Parameter], None],
) -> None:
    """Every parameter of the skeleton read, or quantized, whole on `device` and cut before the next. Parameters that were one object
    still are. Buffers go to `device`."""
    core = net.get_base_model() if hasattr(net, "get_base_model") else net
    made: dict[int, torch.nn.Parameter] = {}

    def real(module: torch.nn.Module, key: str, value: torch.Tensor) -> torch.nn.Parameter:
        before = module._parameters[key]
        assert before is not None
        parameter = torch.nn.Parameter(value, requires_grad=before.requires_grad)
        module._parameters[key] = made[id(before)] = made[id(parameter)] = parameter
        return parameter

    with torch.no_grad(), streaming.Weights(folder) as weights:
        for name, module in core.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            for key, parameter in list(module.named_parameters(recurse=False)):
                if streaming.is_adapter(f"{name}.{key}"):
                    real(module, key, torch.empty_like(parameter, device=device))
        streaming.start_adapters(core, seed)
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
                if id(parameter) not in made:
                    found = weights.rows(streaming.hub_name(f"{name}.{key}"), parameter.shape, 0, len(parameter))
                    cut(real(module, key, found.to(device, dtype)))
                elif streaming.is_adapter(f"{name}.{key}"):
                    parameter.data = parameter.data.to(dtype)
                    cut(parameter)
                else:
                    module._parameters[key] = made[id(parameter)]


def count(model: torch.nn.Module, ranks: int, small: int) -> tuple[int, int]:
    """(bytes of parameters on this rank, bytes of the same whole). Parameters of at most `small` elements stay whole beside their cut.

    Raises JobFailed, with the largest offenders, when a larger one is not cut.
    """
    local = whole = 0
    wrong: list[tuple[int, str]] = []
    for name, p in model.named_parameters():
        width = p.element_size()
        here = p.ds_tensor.numel() + p.numel()  # its piece, and what is gathered now
        if p.ds_numel > small and here > -(-p.ds_numel // ranks):
            wrong.append((here * width, name))
        local, whole = local + here * width, whole + p.ds_numel * width
    if wrong:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in sorted(wrong, reverse=True)[:3])
        raise JobFailed(
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
    from deepspeed.zero import GatheredParameters

    for name, tensor in model.state_dict(keep_vars=True).items():
        if name_ok(name):
            with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                found = tensor.detach().clone()
            yield name, found


# --- checkpoints ------------------------------------------------------------------------------------------------------


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

    Raises ValueError when the files hold other parameters than the model trains, or pieces of other sizes.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    files = sorted(folder.glob("zero3-*-of-*.safetensors"), key=lambda file: int(file.name.split("-")[1]))
    if not files:
        raise ValueError(f"{folder} was not written under ZeRO-3; resume with the layout that wrote it.")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
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


def make_states(states: Any, step: float) -> None:
    """AdamW's states as its first step would make them, for `load` to fill."""
    for flat in states.fp32_partitioned_groups_flat:
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        states.optimizer.state[flat] = {"step": torch.tensor(step, dtype=torch.float32, device=_step_device(states, flat))}
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
        raise ValueError(f"the files hold {at} of {total} elements of {name}; one of them is missing or of another model")
    return out
