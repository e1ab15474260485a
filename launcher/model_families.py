"""The supported decoder families: how the modules of each `model_type` differ, and what a config.json may leave out.

The rules are those of transformers' own modules: biases, norms per block, query and key norms, fused projections,
experts in one tensor. A test counts every family against them. Counting with these rules is in `model_layout.py`. Left
out: encoders, vision towers, and families that are not listed, which `model_files.py` can count from a checkpoint's
headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """The rule of one `model_type`.

    `defaults` are what transformers assumes for a key that config.json leaves out (None: derived from the others).
    `qkv_bias`, `out_bias`, `mlp_bias` and `head_bias` are a constant or the config key that decides. `norms` counts the
    norm weights of hidden size in a block; `qk_norm` says whether query and key have one per head width or over all
    heads, whose width is then that of the heads or what the hidden size gives each; `score` whether transformers has
    a class for one score a row, which a reward model is.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "all", "hidden"] = "none"
    fused: bool = False
    moe: Literal["none", "mixtral", "qwen3_moe", "phimoe"] = "none"
    score: bool = True


def _defaults(
    sizes: str, *, tied: bool = False, head_dim: int | None = None, positions: int, **more: Any
) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    values = [None if word == "-" else int(word) for word in sizes.split()]
    return {
        **dict(zip(names, values, strict=True)),
        "tie_word_embeddings": tied,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        **more,
    }


_LLAMA = _defaults("4096 11008 32 32 - 32000", positions=2048)
_MISTRAL = _defaults("4096 14336 32 32 8 32000", positions=131072)

# Text decoders, with a rule here or without, whose classes in transformers 5.23 do not attend by torch's scaled_dot_product_attention;
# those that cap their scores never can.
CAPPED = frozenset({"gemma2", "vaultgemma"})
NO_SDPA = CAPPED | {"bloom", "codegen", "cpmant", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt", "xglm"}

# Defaults are those of the configuration classes in transformers 5.23.
FAMILIES: dict[str, Family] = {
    "llama": Family(defaults=_LLAMA, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "granite": Family(
        defaults=_LLAMA, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", score=False
    ),
    "mistral": Family(defaults=_MISTRAL),
    "mixtral": Family(defaults={**_MISTRAL, "num_local_experts": 8, "num_experts_per_tok": 2}, moe="mixtral"),
    "qwen2": Family(defaults=_defaults("4096 22016 32 32 32 151936", positions=32768), qkv_bias=True),
    "qwen3": Family(
        defaults=_defaults("4096 22016 32 32 32 151936", head_dim=128, positions=32768),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
    ),
    "qwen3_moe": Family(
        defaults=_defaults(
            "2048 6144 24 32 4 151936",
            positions=32768,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        moe="qwen3_moe",
    ),
    "gemma": Family(
        defaults=_defaults("3072 24576 28 16 16 256000", tied=True, head_dim=256, positions=8192),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "gemma2": Family(
        defaults=_defaults("2304 9216 26 8 4 256000", tied=True, head_dim=256, positions=8192),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norms=4,
    ),
    "gemma3_text": Family(
        defaults=_defaults("2304 9216 26 8 4 262208", tied=True, head_dim=256, positions=131072),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norms=4,
        qk_norm="head",
    ),
    "phi3": Family(defaults=_defaults("3072 8192 32 32 - 32064", positions=4096), fused=True),
    "phimoe": Family(
        defaults=_defaults("4096 6400 32 32 8 32064", positions=131072, num_local_experts=16, num_experts_per_tok=2),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        head_bias="lm_head_bias",
        norm_bias=True,
        moe="phimoe",
    ),
    "olmo2": Family(
        defaults=_defaults("4096 11008 32 32 - 50304", positions=2048),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="all",
    ),
    "olmoe": Family(
        defaults=_defaults("2048 2048 16 16 - 50304", positions=4096, num_experts=64, num_experts_per_tok=8),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="hidden",
        moe="qwen3_moe",
        score=False,
    ),
    "olmo3": Family(
        defaults=_defaults("4096 11008 32 32 - 50304", positions=2048),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="all",
    ),
    "smollm3": Family(
        defaults=_defaults("2048 11008 36 16 4 128256", tied=True, positions=32768),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
}
