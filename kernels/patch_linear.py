"""Linear layers as the ops want them: the plain tensors of a dense, 4-bit or LoRA layer, read afresh on every call.

`projection` says for one layer and one input either the tensors or, as a sentence, why the layer's own forward must
run: adapters can be switched off, merged or changed between two calls (the reference pass of DPO does so), and a weight
may be a shard.

A layer that has hooks of its own is never read from outside: hooks are how FSDP2, ZeRO-3 and offloading bring its
weight in, so the layer is called instead. That one rule lets the fused ops stand under any sharding: where a whole
block is one FSDP2 unit, or one ZeRO-3 leaf module, no linear layer has hooks and everything is fused; where each layer
is sharded by itself, each is called.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .functional import LoraLinear, NF4Weight
from .nf4_linear import NF4Linear
from .patch_match import AnyModule, loaded

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch built without distributed
    DTensor = ()  # type: ignore[assignment,misc]


def is_lora(module: AnyModule) -> bool:
    """A PEFT LoRA layer around a dense or 4-bit linear layer, running PEFT's own forward."""
    kinds = (loaded("peft.tuners.lora.layer", "Linear"), loaded("peft.tuners.lora.bnb", "Linear4bit"))
    return any(kind is not None and type(module).forward is kind.forward for kind in kinds)


def is_4bit(module: AnyModule) -> bool:
    """A bitsandbytes Linear4bit or our NF4Linear, running its own forward."""
    kind = loaded("bitsandbytes.nn.modules", "Linear4bit")
    return isinstance(module, NF4Linear) or (kind is not None and type(module).forward is kind.forward)


def is_linear(module: AnyModule) -> bool:
    return type(module).forward is nn.Linear.forward or is_4bit(module) or is_lora(module)


def unknown_linear(module: AnyModule) -> str | None:
    """Why a layer that multiplies by a matrix is none that the ops know (LLM.int8, adapters around it); None for others."""
    adapter = loaded("peft.tuners.lora.layer", "LoraLayer")
    if is_linear(module):
        return None
    if adapter is not None and isinstance(module, adapter) and isinstance(module.base_layer, nn.Linear):
        return f"LoRA around a {type(module.base_layer).__name__}"
    return f"a {type(module).__name__} is not a dense or 4-bit linear layer" if isinstance(module, nn.Linear) else None


def refusal(module: AnyModule) -> str | None:
    """Why the ops cannot take this layer as it now is; None when they can. Looks at no tensor's values."""
    if not is_linear(module):
        return f"a {type(module).__name__} is not a dense, 4-bit or LoRA linear layer"
    if not is_lora(module):
        return _base_refusal(module)
    base, adapters = module.base_layer, _adapters(module)
    if not is_linear(base) or is_lora(base):
        return f"LoRA around a {type(base).__name__}"
    if module.disable_adapters and module.merged:
        return "a merged adapter is switched off"
    if len(adapters) > 1:
        return f"several active adapters ({', '.join(adapters)})"
    for name in adapters:
        if name in module.lora_variant:
            return f"adapter {name} is a variant of LoRA ({type(module.lora_variant[name]).__name__})"
        if module.lora_B[name].bias is not None:
            return f"adapter {name} has a bias"
        if _hooked(module.lora_A[name]) or _hooked(module.lora_B[name]):
            return "its adapter is sharded or hooked by itself"
    return "its base is sharded or hooked by itself" if _hooked(base) else _base_refusal(base)


def _base_refusal(base: AnyModule) -> str | None:
    if is_4bit(base) and not isinstance(base, NF4Linear):
        state = _quant_state(base)
        if state is None:
            return "the 4-bit weight is not quantized yet"
        if state.quant_type != "nf4":
            return f"the 4-bit weight is {state.quant_type}, not nf4"
        if getattr(state, "packing_format_for_cpu", False):
            return "the 4-bit weight was repacked by a forward pass in eval mode on this CPU"
    return "its weight is a shard (DTensor)" if isinstance(base.weight, DTensor) else None


def projection(module: AnyModule, x: Tensor) -> tuple[LoraLinear, torch.dtype] | str:
    """The layer's tensors for input x and the dtype in which it computes, or why its own forward must run instead."""
    reason = refusal(module)
    if reason is not None:
        return reason
    base = module.base_layer if is_lora(module) else module
    dtype = x.dtype
    if is_4bit(base):
        if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not isinstance(base, NF4Linear):
            return "one token without gradients: bitsandbytes has a matrix-vector kernel for that"
        dtype = base.compute_dtype or x.dtype
    weight = _nf4(base) if is_4bit(base) else base.weight
    names = [] if base is module or module.disable_adapters or module.merged else _adapters(module)
    if not names:
        return LoraLinear(weight=weight, bias=base.bias), dtype
    A, B = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
    if isinstance(A, DTensor) or isinstance(B, DTensor):
        return "its adapter is a shard (DTensor)"
    dropout = module.lora_dropout[names[0]]
    x_lora = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training else None
    return LoraLinear(weight=weight, A=A, B=B, scaling=module.scaling[names[0]], bias=base.bias, x_lora=x_lora), dtype


def projections(modules: Sequence[AnyModule], x: Tensor) -> tuple[list[LoraLinear], torch.dtype] | None:
    """All layers of one input, or None if any must run by itself. Worth it for adapters and 4-bit weights only."""
    found = []
    for module in modules:
        if _hooked(module):
            return None
        ready = projection(module, x)
        if isinstance(ready, str):
            return None
        found.append(ready)
    dtypes = {dtype for _, dtype in found}
    return ([p for p, _ in found], dtypes.pop()) if len(dtypes) == 1 else None


def plain(layers: Sequence[LoraLinear]) -> bool:
    """Only dense weights without adapters: torch.nn.Linear does as well."""
    return all(p.A is None and isinstance(p.weight, Tensor) for p in layers)


def plain_layer(module: AnyModule) -> bool:
    """A dense linear layer without an adapter."""
    return type(module).forward is nn.Linear.forward


def linear_forward(self: AnyModule, x: Tensor, *args, **kwargs) -> Tensor:
    """Forward of a LoRA or 4-bit layer: one op in the dtype of the base, in place of PEFT's products in that of the
    adapter.
    """
    ready = "called with further arguments" if args or kwargs else projection(self, x)
    if isinstance(ready, str):
        return type(self).forward(self, x, *args, **kwargs)
    p, dtype = ready
    y = functional.lora_linear(x.to(dtype), p.weight, p.A, p.B, p.scaling, p.bias, p.x_lora)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _adapters(module: AnyModule) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _hooked(module: AnyModule) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _quant_state(base: AnyModule):
    """bitsandbytes keeps it on the weight and on the module; sharding loses the former."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def _nf4(base: AnyModule) -> NF4Weight:
    if isinstance(base, NF4Linear):
        return base.nf4()
    state, packed = _quant_state(base), base.weight
    inner = state.state2 if state.nested else None
    return NF4Weight(
        # The parameter itself, not a view of its storage: under ZeRO-3 a view saved for the backward pass would keep
        # the gathered copy alive. Other storage dtypes hold the same bytes.
        packed=packed if packed.dtype == torch.uint8 else packed.detach().view(torch.uint8),
        absmax=state.absmax, code=state.code, shape=tuple(state.shape), dtype=state.dtype, blocksize=state.blocksize,
        code2=inner.code if inner else None, absmax2=inner.absmax if inner else None,
        offset=state.offset.reshape(()) if inner else None, blocksize2=inner.blocksize if inner else 256,
    )  # fmt: skip
