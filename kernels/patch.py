"""Put a Hugging Face model on the kernel layer, reversibly: `patch` swaps forwards on module instances, `unpatch` puts
them back.

Call it after PEFT and quantization and before sharding. What is taken is decided by `patch_match` (is this forward one
that we know?), what a layer holds is looked at on every call (`patch_linear`), and the replacements are in
`patch_layers` (norm, rotation, q/k/v, MLP, decoder layer), `patch_loss` (head and causal LM) and `patch_documents`
(packed rows on a CPU). Classes, library globals and parameters stay as they are; a deep copy or a pickle of a patched
model is a patched model.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import functional, patch_documents
from .patch_layers import attention_forward, block_forward, eager_attention, mlp_forward, norm_forward
from .patch_linear import is_4bit, is_linear, is_lora, linear_forward, plain_layer, refusal, unknown_linear
from .patch_loss import causal_lm_forward, head_forward, logit_transform
from .patch_match import AnyModule, Attention, Block, CausalLM, Mlp, Norm, activation_name, loaded, pattern, role
from .patch_report import Fused, KernelReport, Skipped

_SHARDING = (
    "a weight is read in the forward of its own module, or of the attention or MLP above it; FSDP2 gathers those "
    "together when a decoder layer is one unit, ZeRO-3 because attention and MLP are marked as leaf modules; a linear "
    "layer that is sharded by itself is called, not read"
)


def patch(model: nn.Module, *, enable: bool = True, device: torch.device | None = None) -> KernelReport:
    """Swap the forwards that the layer knows; with enable=False only undo an earlier patch. Changes no parameter.

    model: a transformers causal LM or a PEFT model around one. Afterwards it also takes token_labels (see
    `patch_loss`). `device`: where it will run, if it is not there yet (meta). Patching again starts over. Raises
    nothing for what it does not know: that runs as before and is in the report.
    """
    unpatch(model)
    log = _Log()
    if not enable:
        return log.report(model, loss="the model's own", attention="the model's own", off=True)
    attention = "the model's own"
    loss = "the model's own: no causal LM found"
    for name, module in list(model.named_modules()):
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None and module.can_generate():
            attention = _patch_attention_choice(module, device or next(module.parameters()).device)
            loss = _patch_causal_lm(module, name, log)
        else:
            _patch_module(module, name, log)
    return log.report(model, loss=loss, attention=attention, device=device)


def unpatch(model: nn.Module) -> None:
    """Restore every forward and attribute that `patch` changed."""
    for module in model.modules():
        own = module.__dict__
        if "kernel_attention_before" in own:
            own["config"]._attn_implementation = own["kernel_attention_before"]
        for name, (present, value) in own.pop("kernel_saved", {}).items():
            if present:
                own[name] = value
            else:
                del own[name]


class _Log:
    """Counts while walking; `report` turns them into plain data."""

    def __init__(self) -> None:
        self.fused: Counter[tuple[str, str]] = Counter()
        self.skipped: dict[tuple[str, str], list[str]] = {}
        self.inside: set[int] = set()  # linear layers whose tensors the op of the module above reads: counted there
        self.leaves: set[int] = set()  # modules whose gradients ZeRO-3 may take together: see `patch_layers._block`

    def took(self, module: AnyModule | str, op: str, count: int = 1) -> None:
        self.fused[module if isinstance(module, str) else _label(module), op] += count

    def left(self, module: AnyModule, name: str, reason: str) -> None:
        self.skipped.setdefault((_label(module), reason), []).append(name)

    def report(
        self,
        model: nn.Module,
        *,
        loss: str,
        attention: str,
        off: bool = False,
        device: torch.device | None = None,
    ) -> KernelReport:
        some = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        if device is not None:
            some = some.new_empty(0, device=device)
        return KernelReport(
            applied=bool(self.fused) and not off,
            backend=functional.choose("report", some),
            fused=tuple(Fused(module=m, op=op, count=n) for (m, op), n in sorted(self.fused.items())),
            skipped=tuple(
                Skipped(module=m, reason=why, count=len(names), example=names[0])
                for (m, why), names in sorted(self.skipped.items())
            ),
            loss=loss,
            attention=attention,
            sharding="not patched" if off else _SHARDING,
            launch_table_hash=functional.launch_table_hash(),
        )


def _install(module: AnyModule, forward: Callable | None = None, **attributes: Any) -> None:
    """Set instance attributes, remembering what they were. Bound methods follow their module into deep copies."""
    if forward is not None:
        attributes["forward"] = MethodType(forward, module)
    own = module.__dict__
    saved = own.setdefault("kernel_saved", {})
    for name, value in attributes.items():
        saved.setdefault(name, (name in own, own.get(name)))
        own[name] = value


def _patch_module(module: AnyModule, name: str, log: _Log) -> None:
    known = pattern(module)
    if known is None:
        if is_linear(module):
            _patch_linear(module, name, log)
        elif (base := unknown_linear(module)) is not None:
            if not name.endswith(".base_layer"):
                log.left(module, name, base)
        elif role(module) not in (None, "causal_lm"):  # PEFT's wrappers are called ...ForCausalLM too
            log.left(module, name, "its forward is not one that the layer knows")
        return
    if "forward" in vars(module):
        log.left(module, name, "its forward was already replaced on the instance")
    elif isinstance(known, Norm):
        _install(module, norm_forward, kernel_pattern=known)
        log.took(module, "rms_norm")
    elif isinstance(known, Attention):
        _patch_attention(module, known, log)
    elif isinstance(known, Mlp):
        _patch_mlp(module, name, known, log)
    elif isinstance(known, Block):
        norm = module.pre_feedforward_layernorm if known.sandwich else module.post_attention_layernorm
        if isinstance(pattern(norm), Norm):
            _install(module, block_forward, kernel_pattern=known)
            log.leaves |= {id(module.self_attn), id(module.mlp)}
            log.took(module, "add_rms_norm")
        else:
            log.left(module, name, "its norm is not one that the layer knows")


def _patch_attention(module: AnyModule, known: Attention, log: _Log) -> None:
    attributes: dict[str, Any] = {"kernel_pattern": known, "kernel_eager_attention": eager_attention(module)}
    layers = [] if known.packed_qkv else [module.q_proj, module.k_proj, module.v_proj]
    if layers and all(refusal(layer) is None for layer in layers) and not all(map(plain_layer, layers)):
        log.took(layers[0], "lora_qkv", 3)
        log.inside |= {id(layer) for layer in layers}
    if id(module) in log.leaves and not all(map(plain_layer, filter(is_linear, module.children()))):
        attributes["_z3_leaf"] = True
    _install(module, attention_forward, **attributes)
    log.took(module, "rope")


def _patch_mlp(module: AnyModule, name: str, known: Mlp, log: _Log) -> None:
    activation = activation_name(module.activation_fn if known.packed else module.act_fn)
    if activation is None:
        log.left(module, name, "its activation is neither SiLU nor GELU")
        return
    gated = "swiglu" if activation == "silu" else "geglu"
    attributes: dict[str, Any] = {"kernel_pattern": known, "kernel_activation": activation}
    reasons = [] if known.packed else [refusal(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    whole = (
        bool(reasons)
        and not any(reasons)
        and not any(map(_drops, (module.gate_proj, module.up_proj, module.down_proj)))
    )
    if whole:
        log.inside |= {id(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)}
    if id(module) in log.leaves and (whole or not all(map(plain_layer, filter(is_linear, module.children())))):
        attributes["_z3_leaf"] = True
    _install(module, mlp_forward, **attributes)
    log.took(module, f"lora_mlp ({gated})" if whole else gated)


def _patch_linear(module: AnyModule, name: str, log: _Log) -> None:
    if plain_layer(module):
        return
    reason = "its forward was already replaced on the instance" if "forward" in vars(module) else refusal(module)
    if reason is not None:
        log.left(module, name, reason)
        return
    if is_4bit(module):
        # bitsandbytes repacks the weight in place at the first forward in eval mode on CPUs with AVX512-BF16, and
        # training goes on with wrong bytes (loss off by 0.0024 in the model where this was found).
        _install(module, linear_forward, support_avx512bf16_for_cpu=False)
    else:
        _install(module, linear_forward)
    if id(module) not in log.inside and not name.endswith(".base_layer"):
        log.took(module, "lora_linear")


def _patch_causal_lm(model: AnyModule, name: str, log: _Log) -> str:
    known = pattern(model)
    by_document = model.config._attn_implementation == patch_documents.NAME
    attributes: dict[str, Any] = {"kernel_head_name": None, "kernel_by_document": by_document, "kernel_pattern": known}
    if "forward" in vars(model):
        log.left(model, name, "its forward was already replaced on the instance")
        return "the model's own: its forward was already replaced on the instance"
    heads, reason = (
        _heads(model) if isinstance(known, CausalLM) else ([], "the model's forward is not one that the layer knows")
    )
    if reason is None:
        attributes["kernel_head_name"] = "lm_head"
        _install(model, causal_lm_forward, **attributes)
        for head in heads:
            _install(head, head_forward, kernel_logits=logit_transform(model))
        if isinstance(known, CausalLM) and known.router:
            helpers = inspect.unwrap(type(model).forward).__globals__
            _install(model, kernel_balancing_loss=helpers["load_balancing_loss_func"])
        log.took(heads[0], "token_loss")
        return "per token in the head's forward, logits never whole"
    _install(model, causal_lm_forward, **attributes)
    log.left(model, name or "model", reason)
    return f"per token from whole logits: {reason}"


def _heads(model: AnyModule) -> tuple[list[nn.Module], str | None]:
    """The dense layers that can act as the head (several when PEFT keeps a trained copy), or why there is none."""
    head: Any = getattr(model, "lm_head", None)
    wrapper = loaded("peft.utils.other", "ModulesToSaveWrapper")
    saved = wrapper is not None and isinstance(head, wrapper)
    heads: list[Any] = [head.original_module, *head.modules_to_save.values()] if saved else [head]
    if all(isinstance(h, nn.Module) and plain_layer(h) and "forward" not in vars(h) for h in heads):
        return heads, None
    return (
        [],
        f"its head is a {_label(head) if isinstance(head, nn.Module) else type(head).__name__}, not a dense layer",
    )


def _patch_attention_choice(model: AnyModule, device: torch.device) -> str:
    chosen = model.config._attn_implementation
    known = isinstance(pattern(model), CausalLM)  # an unknown model may want masks of its own
    if chosen not in ("sdpa", patch_documents.NAME) or device.type not in ("cpu", "meta") or not known:
        return f"{chosen}, transformers' own"
    patch_documents.register()
    _install(model, kernel_attention_before=chosen)
    model.config._attn_implementation = patch_documents.NAME
    return f"{patch_documents.NAME}: on a CPU packed rows as one causal product per document, else transformers' sdpa"


def _drops(layer: AnyModule) -> bool:
    return is_lora(layer) and any(isinstance(d, nn.Dropout) and d.p > 0 for d in layer.lora_dropout.values())


def _label(module: AnyModule) -> str:
    if is_lora(module):
        return f"LoRA {'NF4' if is_4bit(module.base_layer) else 'Linear'}"
    return "NF4 Linear" if is_4bit(module) else type(module).__name__
