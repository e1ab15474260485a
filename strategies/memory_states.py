"""Bytes that do not depend on the batch: weights, adapters, gradients, optimizer state, gathered copies, buffers.

One `States` per request, all per GPU. The layouts differ in what is cut and what is whole:

    none, ddp       everything whole
    fsdp1, fsdp2    everything cut into `shards`; the root unit (embedding, head) and one block (fsdp1) or two (fsdp2)
                    are whole while computing; with fp32 parameters under mixed precision the whole copies are 16-bit
    zero2           weights whole, gradients and optimizer state cut
    zero3           as fsdp; whole copies are kept up to `stage3_max_live_parameters`, gradients pass through buckets

Left out: what grows with tokens (`memory_activations.py`) and what the allocator adds (`memory_reserved.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from .memory_constants import CONSTANTS as C
from .memory_request import SHARDED, MemoryRequest, once


class States(NamedTuple):
    """Bytes per GPU.

    `weights` base or full model; `adapters` their parameters; `gradients` of everything that trains, as kept between
    backward and step; `optimizer` moments and master copies; `step_temporary` lives only in the optimizer step; `root`, `head`
    and `block` are gathered copies (`one_block` of it is one); `casts` 16-bit copies that autocast makes of whole fp32
    weights; `head_gradient` is the unsharded gradient of embedding and head inside backward, `block_gradient` that of the matrix
    whose backward runs, `block_gradients` those of one block before they are reduced; `reduced_block` and `reduced_root` what FSDP2
    sends to be reduced, in fp32, for a block and for the root unit; `buffers` fixed communication buffers and
    workspaces; `staging` one matrix on its way in; `host` what offload moves to the CPU. `trainable` counts elements of
    the whole model.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    step_temporary: int
    root: int
    head: int
    block: int
    one_block: int
    casts: int
    head_gradient: int
    block_gradient: int
    block_gradients: int
    reduced_block: int
    reduced_root: int
    buffers: int
    staging: int
    trainable: int
    host: int


@once
def compute_width(r: MemoryRequest) -> int:
    """Bytes of an element of the matrix products: 4 in fp32, else 2."""
    return 4 if r.precision == "fp32" else 2


@once
def trainable_width(r: MemoryRequest) -> int:
    """Bytes of a trainable parameter as the optimizer sees it in its module.

    Mixed precision means fp32 for what trains, except under DeepSpeed, whose modules hold 16 bit and whose optimizer
    holds the fp32 copy.
    """
    if r.precision == "fp32":
        return 4
    if r.adapters and r.precision == "fp16":
        return 4  # PEFT keeps the adapters of an fp16 base in fp32: fp16 gradients cannot be unscaled
    mixed = r.precision.endswith("mixed")
    return 4 if mixed and r.parallel not in ("zero2", "zero3") else 2


@once
def adapter_params(r: MemoryRequest) -> int:
    """Elements of all adapters: r x (in + out) for every target of every layer (of every expert)."""
    m, total = r.model, 0
    for target in r.lora_targets or ():
        copies = 1 if target == "lm_head" else m.num_layers * (m.experts if target in ("gate", "up", "down") else 1)
        total += copies * sum(m.linear_shapes[target])
        if (
            m.fused_experts and m.experts > 1 and target in ("gate", "up")
        ):  # one tensor of both, which each rank reaches whole
            total += copies * m.intermediate_size
    return total * (r.lora_r or 0) if r.adapters else 0


@once
def base_linear_width(r: MemoryRequest) -> tuple[float, float]:
    """Bytes of a weight of a projection matrix: (what a sharded layout cuts, what stays on every rank).

    NF4 is half a byte plus one absmax a block of 64: fp32, or 8-bit with an fp32 one for every 256 blocks (Dettmers et
    al. 2023, arXiv 2305.14314, section 3). bitsandbytes keeps absmax in the module, not in the parameter, so FSDP does
    not cut it.
    """
    if r.method == "qlora":
        double = r.double_quant is not False
        block, outer = C["nf4_block"], C["nf4_double_block"]
        if (
            r.kernels == "trebuchet" and r.parallel == "fsdp2"
        ):  # kernels/nf4_linear.py: absmax is sharded with its weights
            return (0.5 + 1 / block, 4 / (block * outer)) if double else (0.5 + 4 / block, 0.0)
        return 0.5, (1 / block + 4 / (block * outer)) if double else 4 / block
    if r.method == "lora8":
        return 1.0, 0.0  # one byte a weight; one fp32 scale a row is under 0.1 % of it
    return float(compute_width(r)), 0.0


@once
def other_width(r: MemoryRequest) -> int:
    """Bytes of a weight of embedding, head and norms when the base is frozen.

    `prepare_model_for_kbit_training` (PEFT) holds them in fp32; that is what fp16-mixed over a 4-bit base means here.
    This project does not call it: its kernels take 16-bit norms and heads and compute in fp32 inside.
    """
    kbit = r.method in ("qlora", "lora8") and r.precision == "fp16-mixed" and r.kernels != "trebuchet"
    return 4 if kbit else compute_width(r)


@once
def hidden_width(r: MemoryRequest) -> int:
    """Bytes of a hidden-state element between the projections."""
    return max(compute_width(r), other_width(r)) if r.adapters else compute_width(r)


@once
def residual_width(r: MemoryRequest) -> int:
    """Bytes of an element of the residual stream. Under autocast, without FSDP's casts, fp32 weights make it fp32: the
    embedding is, and adding a 16-bit output to fp32 stays so."""
    autocast = not r.adapters and r.precision.endswith("mixed") and r.parallel in ("none", "ddp")
    return 4 if autocast else hidden_width(r)


@once
def states(r: MemoryRequest) -> States:
    """The batch-independent bytes of one GPU for `r`."""
    m = r.model
    n = r.shards if r.parallel in SHARDED else 1
    zero = r.parallel in ("zero2", "zero3")
    width, compute = trainable_width(r), compute_width(r)
    adapters = adapter_params(r)
    trainable, pad = adapters if r.adapters else m.total_params, padding(r, n)
    weights = _weights(r, n)
    held = trainable + (0 if r.adapters else m.num_layers * pad)
    gradients = held * width // (r.shards if zero else n)
    optimizer, temporary = _optimizer(r, held, n)
    adapter_bytes, host = adapters * width // n, 0
    if r.offload != "none":
        host, optimizer, temporary = optimizer, 0, 0
    if r.offload == "params":  # absmax values live in the module and stay (bitsandbytes)
        stay = int(m.num_layers * m.block_quantized_params * base_linear_width(r)[1]) if r.adapters else 0
        host += weights - stay + adapter_bytes + gradients
        weights, adapter_bytes, gradients = stay, 0, 0
    root, block = _gathered(r, n)
    apart = r.parallel == "fsdp2" and m.head_params > 0  # embedding and head are units of their own, like a block
    whole = n > 1 or r.offload == "params"  # from the other ranks' shards, or from host memory
    head = m.head_params * (other_width(r) if r.adapters else compute) if apart and whole else 0
    whole_gradients = compute if n > 1 or zero else width
    autocast = residual_width(r) > hidden_width(r)
    fsdp2 = r.parallel == "fsdp2" and n > 1 and not r.adapters
    one = m.hidden_size * m.intermediate_size
    return States(
        weights=weights,
        adapters=adapter_bytes,
        gradients=gradients,
        optimizer=optimizer,
        step_temporary=temporary,
        root=0 if apart else root,
        head=head,
        block=block,
        one_block=block // blocks_gathered(r, n),
        casts=_cast_params(r) * compute if autocast else 0,
        head_gradient=0 if r.adapters else m.embedding_params * whole_gradients,
        block_gradients=0 if r.adapters else m.block_params * whole_gradients,
        reduced_block=4 * (m.block_params + pad) if fsdp2 else 0,
        reduced_root=4 * m.embedding_params if fsdp2 else 0,
        block_gradient=0 if r.adapters else (m.experts if m.fused_experts else 1) * one * whole_gradients,
        buffers=_buffers(r),
        staging=m.hidden_size * max(m.intermediate_size, m.vocab_size) * compute if r.adapters else 0,
        trainable=trainable,
        host=host,
    )


def padding(r: MemoryRequest, n: int) -> int:
    """Elements that FSDP2 adds to one block's three-dimensional experts, over all ranks: it cuts them by expert, and the rank that holds
    most has ceil(experts / n) of them. With more ranks than experts some hold none and the gathered block is as large as if all did."""
    m = r.model
    if r.parallel != "fsdp2" or not m.fused_experts or m.experts == 1:
        return 0
    each = 3 * m.hidden_size * m.intermediate_size
    return (-(-m.experts // n) * n - m.experts) * each


def _cast_params(r: MemoryRequest) -> int:
    """Elements of the weights that autocast keeps 16-bit copies of until the forward pass ends. This project's MLP casts
    one weight at a time, inside its op."""
    m = r.model
    if r.kernels != "trebuchet":
        return m.total_params - m.embedding_params
    attention = sum(m.linear_shapes[name][0] * m.linear_shapes[name][1] for name in ("q", "k", "v", "o"))
    return m.num_layers * attention + m.embedding_params


def _weights(r: MemoryRequest, n: int) -> int:
    """Bytes of the base or full model, and of a frozen reference where the objective needs one."""
    m = r.model
    if not r.adapters:
        total = m.total_params + m.num_layers * padding(r, n)
        reference = total * compute_width(r) if r.needs_reference else 0
        return (total * trainable_width(r) + reference) // n
    cut, whole = base_linear_width(r)
    copies = 2 if r.needs_reference else 1
    linear = m.num_layers * m.block_quantized_params
    other = m.total_params - linear + m.num_layers * padding(r, n)
    litgpt = r.method == "qlora" and r.kernels == "chunked-ce" and r.parallel == "none"
    head = m.head_params if litgpt else 0  # LitGPT's 4-bit plug-in replaces the head too
    return int(copies * ((linear + head) * (cut / n + whole) + (other - head) * other_width(r) / n))


def _optimizer(r: MemoryRequest, trainable: int, n: int) -> tuple[int, int]:
    """(moments and master copies, temporary of the step) in bytes.

    AdamW keeps two moments in the parameter's dtype (Loshchilov and Hutter 2019); the 8-bit kind one byte each with an
    fp32 absmax a block of 256 (Dettmers et al. 2022, arXiv 2110.02861). DeepSpeed keeps an fp32 copy and fp32 moments.
    PyTorch's foreach step allocates one whole-model temporary. Paged state lives outside the allocator.
    """
    width = trainable_width(r)
    zero = r.parallel in ("zero2", "zero3")
    cut = r.shards if zero else n
    moments = {"sgd": 0.0, "adamw-8bit": 2 + 8 / C["adam8bit_block"], "paged-adamw-8bit": 0.0}.get(
        r.optimizer, 2.0 * width
    )
    if zero and r.precision.endswith("mixed"):
        moments = 4 + (8.0 if moments == 2.0 * width else moments)
    temporary = trainable * width // cut if r.optimizer == "adamw-foreach" else 0
    if zero and r.precision.endswith("mixed"):  # the fp32 gradient of one sub-group
        temporary = 4 * min(trainable // cut, C["zero3_sub_group_elements"])
    return int(trainable * moments / cut), temporary


def _gathered(r: MemoryRequest, n: int) -> tuple[int, int]:
    """(root unit, blocks) that are whole on every rank while computing, in bytes."""
    if r.parallel not in SHARDED or (n == 1 and r.parallel != "zero3" and r.offload != "params"):
        return 0, 0
    m = r.model
    root = (m.embedding_params + m.head_params) * (other_width(r) if r.adapters else compute_width(r))
    width = base_linear_width(r)[0] if r.adapters else compute_width(r)
    if r.parallel == "zero3":
        live = min(m.total_params, C["zero3_max_live_elements"]) + C["zero3_prefetch_elements"]
        return root, int(live * width)
    wide = m.block_linear_params - m.block_quantized_params + padding(r, n)
    return root, int(m.block_quantized_params * width + wide * compute_width(r)) * blocks_gathered(r, n)


def blocks_gathered(r: MemoryRequest, n: int) -> int:
    """Whole blocks at one time. On one GPU FSDP2 has nothing to gather ahead: weights from the host come when they are needed."""
    if r.parallel not in ("fsdp1", "fsdp2") or n == 1:
        return 1
    return int(C[f"{r.parallel}_blocks_gathered"])


def _buffers(r: MemoryRequest) -> int:
    """Buffers of fixed size for reducing gradients, and the libraries' workspaces, in bytes."""
    m, total = r.model, C["workspace_bytes"]
    if r.parallel in ("zero2", "zero3") and not r.adapters:
        bucket = min(C["zero_bucket_elements"], m.total_params)
        total += C["zero_buckets"] * bucket * compute_width(r)
    elif r.parallel == "ddp" and r.gpus > 1 and r.kernels != "trebuchet":  # this project's gradients are views of them
        total += (adapter_params(r) if r.adapters else m.total_params) * trainable_width(r)  # gradient buckets
    return total
