"""Small models of the families that the layer knows, and the parity measurement that the tests of `patch` share."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 211
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def model(family: str = "llama", *, lora: dict[str, Any] | None = None, seed: int = 0, **config: Any) -> Any:
    """Two layers, hidden 64, fp32, weights large enough for every path to matter; `lora`: arguments of LoraConfig."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    chosen = {**sizes, **FAMILIES[family], **config}
    attention = chosen.pop("attn_implementation", "sdpa")
    net: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **chosen), attn_implementation=attention)
    for p in net.parameters():
        nn.init.normal_(p, std=0.15) if p.dim() > 1 else nn.init.normal_(p, 0.8, 0.2)
    return adapt(net, **lora).train() if lora is not None else net.train()


def adapt(net: Any, **lora: Any) -> Any:
    net = get_peft_model(net, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}))
    randomize_adapters(net)
    return net


def randomize_adapters(net: Any) -> None:
    """B is zero in a fresh adapter, and half of the gradients with it."""
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)


def quantized(storage: torch.dtype = torch.uint8) -> Any:
    """A 4-bit base with double quantization under LoRA, computing in fp32.

    Its inner sizes are multiples of 64: on others bitsandbytes' CPU kernel dequantizes wrongly (relative error 0.27,
    not 0.09).
    """
    import bitsandbytes as bnb

    net = model("llama")
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                options = {"compute_dtype": torch.float32, "quant_type": "nf4", "quant_storage": storage}
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, **options)
                layer.load_state_dict({"weight": child.weight.data})
                setattr(parent, name, layer.to("cpu"))
    net.is_loaded_in_4bit = True
    return adapt(net.requires_grad_(False)).train()


def batch(rows: int = 2, tokens: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """Packed rows: two documents in each, of different lengths; some labels ignored."""
    g = torch.Generator().manual_seed(seed)
    cuts = [tokens // 2 - 2 + 3 * i for i in range(rows)]
    return {
        "input_ids": torch.randint(3, VOCAB, (rows, tokens), generator=g),
        "position_ids": torch.stack([torch.cat([torch.arange(c), torch.arange(tokens - c)]) for c in cuts]),
        "labels": torch.randint(3, VOCAB, (rows, tokens), generator=g).masked_fill(
            torch.rand(rows, tokens, generator=g) < 0.3, -100
        ),
    }


def whole_logits_loss(net: Any, b: dict[str, Tensor]) -> Tensor:
    """Mean loss as everybody computes it: the unpatched model's logits."""
    out = net(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False)
    return F.cross_entropy(out.logits.float().flatten(0, 1), b["labels"].flatten(), ignore_index=-100)


def token_loss(net: Any, b: dict[str, Tensor]) -> Tensor:
    """The same mean through a patched model."""
    out = net(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False, token_labels=b["labels"])
    assert out.logits is None
    return -out.token_loss.logp.sum() / (b["labels"] != -100).sum()


def gradients(net: Any, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by name); the model's own are cleared."""
    loss.backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return loss.item(), found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference (2-norms) of a gradient and its name; both must hold the same names."""
    assert ours.keys() == theirs.keys() and ours
    return max((((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)).item(), n) for n in theirs)
