"""`plan --probe`: one optimizer step of the planned run on fake tensors, its live bytes beside the formula's.

The model code that a rank would run (transformers, PEFT, bitsandbytes' layers, the kernel layer, activation
checkpointing, FSDP2) under FakeTensorMode and, under FSDP2, with a process group that only pretends, as
rank 0 of the planned number. DDP's reducer reads memory and cannot run so; its buckets are gradients that stay, and such
gradients are there. No weights, no GPU, no data: shapes, dtypes and storages, counted until they die.

Left out, because the fake world has none of it: the caching allocator (compare live bytes, not reserved ones), CUDA's
context and workspaces, and what DeepSpeed does; loading and saving. A step of the longest rows, all of them full; with
accumulation two micro-batches, after which the third is like the second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from ..kernels.launch_table import TABLE
from ..launcher.errors import UserError
from ..launcher.model_spec import table_config
from ..launcher.plan import Chosen, Plan
from ..strategies import fsdp2, prepare, streaming
from ..strategies.fake_memory import StorageTracker, fake_nf4, materialize
from .fake_batch import fake_sums
from .fake_depth import DEPTHS, WHOLE_UP_TO, Timeline, alike, at_depth, cut
from .optim import make_optimizer


@dataclass(frozen=True, kw_only=True)
class FakeStep:
    """Live bytes of rank 0, weights included. `phases` has the formula's names; `measured_at` are the depths that were run, one
    when it was the model's own."""

    phases: dict[str, int]
    measured_at: tuple[int, ...]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())


def fake_step(plan: Plan, *, whole: bool = False) -> FakeStep:
    """Runs the chosen strategy's step: of a deep model whose layers are all alike at three small depths, and each moment's line is
    followed to its own (fake_depth.py); of another, with `whole`, or where a moment is not on a line, all its layers.

    Raises UserError for a plan that has no strategy, or one that cannot be run like this.
    """
    chosen = plan.chosen
    if chosen is None:
        raise UserError(
            "--probe runs one step of the chosen strategy, and nothing fits; see `trebuchet plan` without it."
        )
    refuse(plan)
    began = time.perf_counter()
    config = config_of(plan)
    depths: tuple[int, ...] = DEPTHS
    layers: int = config.get_text_config().num_hidden_layers
    places = None
    with _world(chosen), _as_on(chosen.device), _from_host(chosen):
        if not whole and layers > WHOLE_UP_TO and alike(config):
            places = at_depth([_step(plan, depth).places() for depth in DEPTHS], layers)
        if places is None:
            depths = (layers,)
            peaks: Mapping[Any, int] = _step(plan, layers).peaks
        else:
            peaks = places
    phases: dict[str, int] = {}
    for (what, *_), peak in peaks.items():
        phase = "optimizer_step" if what == "step" else "forward_backward"
        phases[phase] = max(phases.get(phase, 0), peak)
    return FakeStep(phases=phases, measured_at=depths, seconds=time.perf_counter() - began)


def refuse(plan: Plan) -> None:
    """UserError for what the fake world cannot run, with what to probe instead."""
    chosen, config = plan.chosen, plan.config
    assert chosen is not None
    if chosen.parallel == "zero3":
        raise UserError(
            "--probe cannot run DeepSpeed, whose buffers are not made by torch operators; probe FSDP2 instead: "
            "--set strategy.parallel=fsdp2 --set strategy.offload=none."
        )
    if config.objective.name == "reward":
        raise UserError("--probe knows no score heads; a dpo of the same pairs costs as much: --set objective=dpo.")
    if config.objective.reference_for(chosen.method) == "copy":
        raise UserError(
            "--probe holds one model, and objective.reference: copy is a second one: --set objective.reference=auto."
        )
    if chosen.method == "qlora" and config.strategy.quant.type != "nf4":
        raise UserError("--probe knows NF4 layers only: --set strategy.quant.type=nf4.")


def _step(plan: Plan, layers: int) -> Timeline:
    chosen, config = plan.chosen, plan.config
    assert chosen is not None
    net = build(plan, layers)
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=False), tracker, torch.device("cpu"):
        materialize(net, "cpu")
        optimizer = make_optimizer(net.named_parameters(), "adamw", 1e-5, 0.0)
        trainable = [p for p in net.parameters() if p.requires_grad]
        for parameter in trainable:  # between steps the optimizer has its states
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        buffers = sum(buffer.nbytes for buffer in net.buffers())
        on_host = tracker.live_bytes - buffers if chosen.offload == "params" else 0  # weights, gradients, states
        if (
            chosen.accumulation == 1 and chosen.parallel != "ddp" and not on_host
        ):  # else gradients are there from the beginning
            optimizer.zero_grad(set_to_none=True)
        tracker.live_bytes -= on_host
        tracker.restart_peak()
        timeline = Timeline(tracker)
        timeline.watch(net, layers)
        _loss(plan, net).backward()
        timeline.close()
        if not on_host:
            if config.optimization.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trainable, config.optimization.max_grad_norm)
            tracker.restart_peak()
            timeline.mark("step")
            optimizer.step()
            timeline.close()
    return timeline


def config_of(plan: Plan) -> Any:
    from transformers import AutoConfig

    if plan.model.path:
        return AutoConfig.from_pretrained(plan.model.path, local_files_only=True)
    row = table_config(plan.model.name)
    assert row is not None, "a model without a folder is one of the table"
    return AutoConfig.for_model(**row)


def build(plan: Plan, layers: int) -> Any:
    """The planned model with `layers` layers on the meta device: quantized, adapted, patched, checkpointed, sharded; no bytes yet."""
    from transformers import AutoModelForCausalLM

    chosen, config = plan.chosen, plan.config
    assert chosen is not None
    found = cut(config_of(plan), layers)
    with torch.device("meta"):
        net: Any = AutoModelForCausalLM.from_config(
            found, dtype=prepare.storage_dtype(chosen), attn_implementation=prepare.ATTENTION[chosen.attention]
        )
        net.config.use_cache = False
        if chosen.method == "qlora" and chosen.parallel == "fsdp2":
            dtype = prepare.compute_dtype(chosen.precision)
            streaming.to_nf4(net, double=config.strategy.quant.double, compute_dtype=dtype)
        elif chosen.method == "qlora":
            fake_nf4(net)
        if chosen.method != "full":
            net = prepare._adapt(net, config.strategy, False)
        prepare._patch(net, config.strategy, torch.device("cpu"))
        if chosen.checkpointing != "none":
            prepare._checkpoint_activations(net, chosen)
    if chosen.device == "cuda":
        _cuda_dropout(net)
    if chosen.parallel == "fsdp2":
        core = net.get_base_model() if hasattr(net, "get_base_model") else net
        policy = fsdp2.offload_policy(chosen, torch.device("cpu"))
        fsdp2.shard(core, fsdp2.mesh_of(chosen, torch.device("cpu")), fsdp2.mixed_precision(chosen), policy)
    return net.train()


def _loss(plan: Plan, net: nn.Module) -> Tensor:
    chosen = plan.chosen
    assert chosen is not None
    dtype = prepare.compute_dtype(chosen.precision)
    casts = dtype != torch.float32 and not (chosen.parallel == "fsdp2" and chosen.method == "full")
    with torch.autocast("cpu", dtype=dtype, enabled=casts):
        return fake_sums(plan, net)


@contextlib.contextmanager
def _world(chosen: Chosen) -> Iterator[None]:
    """Rank 0 of a process group of the planned size whose collectives exchange nothing."""
    if chosen.ranks == 1 and chosen.parallel != "fsdp2":
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=chosen.ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    """The loss takes its tokens in chunks of the size that it has on `device`; fake tensors are on the CPU."""
    chunks = TABLE["token_chunk"]
    before = dict(chunks)
    if device == "cuda":
        chunks.update(other_frozen=chunks["cuda_frozen"], other_trained=chunks["cuda_trained"])
    try:
        yield
    finally:
        chunks.update(before)


@contextlib.contextmanager
def _from_host(chosen: Chosen) -> Iterator[None]:
    """A shard that lies in host memory is copied to the GPU before it is gathered, and stays until it has been; from one CPU tensor
    to another there would be no copy."""
    if chosen.offload != "params":
        yield
        return
    inputs: Any = FSDPParam.__dict__["all_gather_inputs"]  # a property

    def arrived(parameter: FSDPParam) -> list[Tensor]:
        shard = parameter._sharded_param_data
        parameter._sharded_param_data = shard.clone()
        try:
            gathered: list[Tensor] = inputs.fget(parameter)
            return gathered
        finally:
            parameter._sharded_param_data = shard

    setattr(FSDPParam, "all_gather_inputs", property(torch.no_grad()(arrived)))  # noqa: B010  # mypy takes it for a method
    try:
        yield
    finally:
        setattr(FSDPParam, "all_gather_inputs", inputs)  # noqa: B010


class _Mask(torch.autograd.Function):
    """Dropout as the CUDA kernel does it: a mask of one byte an element, where the CPU keeps one of the input's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(x, dtype=torch.bool))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


def _cuda_dropout(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = _Mask.apply  # type: ignore[method-assign]
