"""From a config.json to the linear layers and the exact parameter count of the model that transformers would build from
it.

What differs between families is data in `model_families.py`; a test compares the counts with transformers and the
adapters with PEFT. Left out: reading files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ModelError
from .model_families import FAMILIES, Family

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """Matrices of one name and one shape, all blocks together.

    `name` is the module's name inside a block. `lora_rank` is the multiple of r that PEFT gives it (0: never adapted;
    2: gate and up of fused experts, r each). `names` are what a user may list in `targets` for it, where that is not
    `name` or its end.
    """

    name: str
    in_features: int
    out_features: int
    count: int
    kind: Literal["linear", "experts", "router"] = "linear"
    lora_rank: int = 1
    names: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        return self.in_features * self.out_features * self.count

    def lora_params(self, r: int) -> int:
        """Elements of A (in x rank) and B (rank x out) over all copies."""
        return self.lora_rank * r * (self.in_features + self.out_features) * self.count

    def chosen(self, targets: tuple[str, ...]) -> bool:
        """Whether PEFT's suffix rule picks it: the whole name, or its last dotted parts."""
        if self.names:  # PEFT takes fused experts whole or not at all
            return all(any(t == n or t.endswith(f".{n}") for t in targets) for n in self.names)
        return any(self.name == t or self.name.endswith(f".{t}") for t in targets)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Dimensions and counts of one model. `other_params`: norms, biases and routers."""

    dims: Mapping[str, Any]
    linears: tuple[LinearLayer, ...]
    embedding_params: int
    other_params: int


def layout(config: Config) -> Layout:
    """Counts the model that transformers would build from this config.json.

    Raises ModelError for a family that is not listed, and for a dimension that is missing, not a positive whole number,
    or at odds with another.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"model_type '{model_type}' is not one whose parameters can be counted from config.json; "
            f"supported: {', '.join(sorted(FAMILIES))}; in a local folder with safetensors any dense decoder"
        )
    dims = read_dims(config, family.defaults)
    linears = _linears(dims, config, family)
    h, vocab, layers = dims["hidden_size"], dims["vocab_size"], dims["num_layers"]
    embedding = h * vocab * (1 if dims["tie_word_embeddings"] else 2)
    other = layers * _block_other(dims, config, family) + h * (2 if family.norm_bias else 1)
    other += sum(layer.params for layer in linears if layer.kind == "router")
    other += sum(layer.out_features * layer.count for layer in linears if _has_bias(layer, config, family))
    other += vocab if _flag(family.head_bias, config) else 0
    return Layout(dims=dims, linears=linears, embedding_params=embedding, other_params=other)


def read_dims(config: Config, defaults: Config) -> dict[str, Any]:
    """The dimensions under the names of ModelSpec. Raises ModelError for one that is missing, wrong or at odds."""
    given = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    heads, hidden = _positive(given, "num_attention_heads"), _positive(given, "hidden_size")
    if given.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing"
        )
    # Only an absent key takes the family's default; a null means "as many as query heads".
    alike = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    kv = heads if alike else _positive(given, "num_key_value_heads", heads)
    if heads % kv:
        raise ModelError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
    experts_key = "num_local_experts" if "num_local_experts" in given else "num_experts"
    experts = _positive(given, experts_key) if given.get(experts_key) else None
    width = "moe_intermediate_size" if experts and "moe_intermediate_size" in given else "intermediate_size"
    return {
        "hidden_size": hidden,
        "intermediate_size": _positive(given, width),
        "num_layers": _positive(given, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": _positive(given, "head_dim", hidden // heads),
        "vocab_size": _positive(given, "vocab_size"),
        "tie_word_embeddings": bool(given.get("tie_word_embeddings", True)),
        "num_experts": experts,
        "experts_per_token": _positive(given, "num_experts_per_tok") if experts else None,
        "max_position_embeddings": _positive(given, "max_position_embeddings"),
    }


def _positive(given: Config, key: str, fallback: int | None = None) -> int:
    value = given.get(key)
    value = fallback if value is None else value
    if value is None:
        raise ModelError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def _flag(rule: bool | str, config: Config) -> bool:
    return bool(config.get(rule, False)) if isinstance(rule, str) else rule


def _linears(dims: Config, config: Config, family: Family) -> tuple[LinearLayer, ...]:
    h, f, layers = dims["hidden_size"], dims["intermediate_size"], dims["num_layers"]
    q, kv = dims["num_heads"] * dims["head_dim"], dims["num_kv_heads"] * dims["head_dim"]

    def linear(name: str, i: int, o: int, count: int = layers, rank: int = 1) -> LinearLayer:
        return LinearLayer(name=name, in_features=i, out_features=o, count=count, lora_rank=rank)

    if family.fused:
        return (
            linear("self_attn.qkv_proj", h, q + 2 * kv),
            linear("self_attn.o_proj", q, h),
            linear("mlp.gate_up_proj", h, 2 * f),
            linear("mlp.down_proj", f, h),
        )
    attention = (
        linear("self_attn.q_proj", h, q),
        linear("self_attn.k_proj", h, kv),
        linear("self_attn.v_proj", h, kv),
        linear("self_attn.o_proj", q, h),
    )
    if family.moe == "none":
        mlp = (linear("mlp.gate_proj", h, f), linear("mlp.up_proj", h, f), linear("mlp.down_proj", f, h))
        return attention + mlp
    sparse = layers - _dense_layers(config, layers)
    out = attention + _experts(h, f, dims["num_experts"], sparse, family.moe)
    if layers > sparse:  # PEFT renames gate, up and down to the experts' tensors, so these blocks stay without adapters
        wide = _positive({**family.defaults, **config}, "intermediate_size")
        dense = layers - sparse
        out += (
            linear("mlp.gate_proj", h, wide, dense, 0),
            linear("mlp.up_proj", h, wide, dense, 0),
            linear("mlp.down_proj", wide, h, dense, 0),
        )
    return out


def _experts(h: int, f: int, experts: int, layers: int, moe: str) -> tuple[LinearLayer, ...]:
    """Router and experts: transformers 5 keeps the experts of a block in two three-dimensional parameters, not in
    nn.Linear; PEFT 0.21 adapts them for Mixtral, OLMoE and Qwen3, under their names of transformers 4, and not for Phi. Phi's router is a
    Linear that returns two tensors, which PEFT would take for one: it is left without an adapter (strategies/prepare.py)."""
    gate, up, down = {"mixtral": ("w1", "w3", "w2")}.get(moe, ("gate_proj", "up_proj", "down_proj"))
    adapted = moe != "phimoe"
    router = "mlp.gate" if adapted else "mlp.router"
    copies = layers * experts
    return (
        LinearLayer(
            name=router, in_features=h, out_features=experts, count=layers, kind="router", lora_rank=1 if adapted else 0
        ),
        LinearLayer(
            name="mlp.experts.gate_up_proj",
            in_features=h,
            out_features=2 * f,
            count=copies,
            kind="experts",
            lora_rank=2 if adapted else 0,
            names=(gate, up),
        ),
        LinearLayer(
            name="mlp.experts.down_proj",
            in_features=f,
            out_features=h,
            count=copies,
            kind="experts",
            lora_rank=1 if adapted else 0,
            names=(down,),
        ),
    )


def _dense_layers(config: Config, layers: int) -> int:
    """Blocks of a mixture-of-experts model that have an ordinary MLP (Qwen's two keys; 0 elsewhere)."""
    only = config.get("mlp_only_layers") or []
    step = _positive(config, "decoder_sparse_step", 1)
    if not isinstance(only, list):
        raise ModelError(f"config.json: mlp_only_layers must be a list of block numbers, not {only!r}")
    return sum(1 for block in range(layers) if block in only or (block + 1) % step)


def _block_other(dims: Config, config: Config, family: Family) -> int:
    """Norm weights of one block."""
    per_norm = dims["hidden_size"] * (2 if family.norm_bias else 1)
    h, heads, kv, width = (dims[key] for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"))
    qk = {"none": 0, "head": 2 * width, "all": (heads + kv) * width, "hidden": h + h // heads * kv}
    return family.norms * per_norm + qk[family.qk_norm]


def _has_bias(layer: LinearLayer, config: Config, family: Family) -> bool:
    if layer.kind != "linear":
        return False
    if layer.name.startswith("mlp"):
        return _flag(family.mlp_bias, config)
    return _flag(family.out_bias if layer.name.endswith("o_proj") else family.qkv_bias, config)
