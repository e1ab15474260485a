"""What one memory estimate is asked about: a model, a method, a layout, a batch.

Plain frozen data with checks; no arithmetic beyond parameter counts (`ModelDims`) and no import outside the standard
library, so that a planner can build ten thousand of these in a fraction of a second. The names are those of
`trebuchet estimate --json`. What the numbers cost in bytes is in `memory.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeVar

T = TypeVar("T")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
ALLOWED: dict[str, tuple[str, ...]] = {
    "method": ("full", "lora", "qlora", "lora8"),
    "objective": ("sft", "dpo", "ipo", "orpo", "simpo", "cpo", "kto", "reward"),
    "reference": ("auto", "adapters_off", "precomputed", "copy"),
    "precision": ("bf16", "fp16", "fp32", "bf16-mixed", "fp16-mixed"),
    "optimizer": ("adamw", "adamw-foreach", "adamw-8bit", "paged-adamw-8bit", "sgd"),
    "parallel": ("none", "ddp", "fsdp1", "fsdp2", "zero2", "zero3"),
    "offload": ("none", "optimizer", "params"),
    "checkpointing": ("none", "full", "selective"),
    "attention": ("flash", "sdpa", "eager"),
    "kernels": ("none", "ce", "fused", "chunked-ce", "trebuchet"),
}
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
ALIASES = {"accumulation": "grad_accum"}  # as a plan spells it
PAIRED = ("dpo", "ipo", "orpo", "simpo", "cpo", "reward")
SHARDED = ("fsdp1", "fsdp2", "zero3")


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Dimensions of a decoder-only transformer with a gated MLP, as in a Hugging Face `config.json`.

    `fused_experts`: the experts are three-dimensional tensors, as in transformers 5, which bitsandbytes leaves in 16 bits (seen with
    Mixtral and Qwen3-MoE, transformers 5.23, bitsandbytes 0.50). `routing_16bit`: the weights of their outputs are cast back to the
    dtype of the hidden states, as Qwen's are and Mixtral's are not. `capped_scores`: attention's scores pass through a tanh, as
    Gemma 2's do.
    `params` is the exact total if it is known; otherwise it is counted from the dimensions (two norm vectors a block
    and one at the end; biases where the flags say so).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    params: int | None = None
    fused_experts: bool = False
    routing_16bit: bool = False
    capped_scores: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be a positive whole number, got {getattr(self, name)!r}")
        if (self.num_experts or 1) < (self.experts_per_token or 1):
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}, more than model.num_experts ({self.num_experts})"
            )

    @cached_property
    def experts(self) -> int:
        """MLPs in a block: 1 for a dense model."""
        return self.num_experts or 1

    @cached_property
    def active_experts(self) -> int:
        """MLPs that one token passes through: 1 for a dense model."""
        return self.experts_per_token or 1

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each projection, per expert for the three of the MLP, plus `lm_head`."""
        h, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (h, q),
            "k": (h, kv),
            "v": (h, kv),
            "o": (q, h),
            "gate": (h, f),
            "up": (h, f),
            "down": (f, h),
            "lm_head": (h, self.vocab_size),
        }

    @cached_property
    def block_linear_params(self) -> int:
        """Elements of the projection matrices of one block (all experts); what 4-bit and 8-bit loading quantizes."""
        size = {name: i * o for name, (i, o) in self.linear_shapes.items()}
        attention = size["q"] + size["k"] + size["v"] + size["o"]
        return attention + self.experts * (size["gate"] + size["up"] + size["down"])

    @cached_property
    def block_quantized_params(self) -> int:
        """Those of `block_linear_params` that 4-bit and 8-bit loading really quantizes."""
        if not self.fused_experts or self.experts == 1:
            return self.block_linear_params
        return sum(self.linear_shapes[name][0] * self.linear_shapes[name][1] for name in ("q", "k", "v", "o"))

    @cached_property
    def block_other_params(self) -> int:
        """Norm weights, biases and the router of one block: never quantized."""
        h, f = self.hidden_size, self.intermediate_size
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.attention_bias else 0
        biases += self.experts * (2 * f + h) if self.mlp_bias else 0
        router = h * self.experts if self.experts > 1 else 0
        return 2 * h + biases + router

    @cached_property
    def block_params(self) -> int:
        """Elements of one transformer block."""
        return self.block_linear_params + self.block_other_params

    @cached_property
    def embedding_params(self) -> int:
        """Elements of the token embedding."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def head_params(self) -> int:
        """Elements of an output head of its own; 0 where it is tied to the embedding."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @cached_property
    def total_params(self) -> int:
        """All elements: the stated count, else the sum over the dimensions."""
        if self.params:
            return self.params
        return self.num_layers * self.block_params + self.embedding_params + self.head_params + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """One run whose memory is wanted. Sequence length in tokens, `micro_batch` in rows per GPU and forward pass.

    `gpus` counts the GPUs of the job and `dp_replicate` how many whole copies of the sharded state they hold (HSDP),
    so a state is cut into `gpus / dp_replicate` shards. `lora_dropout=None` means "not stated" and is budgeted as if
    dropout were on, which costs one copy of each adapter's input. `kernels` names the loss and norm path: `none` eager
    modules, `ce` Triton cross-entropy over materialised logits with fused RMSNorm and RoPE, `fused` and `chunked-ce`
    logits never whole (the latter with eager modules), `trebuchet` this project's kernels (as `fused`, plus SwiGLU and
    LoRA).
    """

    model: ModelDims
    method: str = "full"
    objective: str = "sft"
    reference: str = "auto"
    double_quant: bool | None = None
    lora_r: int | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float | None = None
    precision: str = "bf16"
    optimizer: str = "adamw"
    parallel: str = "none"
    gpus: int = 1
    dp_replicate: int = 1
    gpus_per_node: int | None = None
    offload: str = "none"
    seq_len: int = 2048
    micro_batch: int = 1
    packed: bool = True
    checkpointing: str = "full"
    attention: str = "flash"
    kernels: str = "none"
    grad_accum: int = 1

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("gpus", "dp_replicate", "seq_len", "micro_batch", "grad_accum"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.gpus % self.dp_replicate:
            raise ValueError(f"dp_replicate ({self.dp_replicate}) must divide gpus ({self.gpus})")
        if self.method != "full":
            if not self.lora_r or self.lora_r < 1:
                raise ValueError(f"method {self.method} needs lora_r, a positive whole number")
            unknown = set(self.lora_targets or ()) - {*LINEARS, "lm_head"}
            if unknown or not self.lora_targets:
                known = ", ".join(LINEARS)
                raise ValueError(f"lora_targets must name some of {known}, lm_head; got {self.lora_targets!r}")

    @cached_property
    def known(self) -> dict[str, Any]:
        """What `once` has worked out for this run; shared with its other micro-batches."""
        return {}

    @cached_property
    def shards(self) -> int:
        """How many pieces a sharded state is cut into."""
        return self.gpus // self.dp_replicate

    @cached_property
    def rows(self) -> int:
        """Rows in one forward pass: a preference pair is two."""
        return self.micro_batch * (2 if self.objective in PAIRED else 1)

    @cached_property
    def tokens(self) -> int:
        """Tokens in one forward pass of one GPU."""
        return self.rows * self.seq_len

    @cached_property
    def adapters(self) -> bool:
        """Whether only adapters train."""
        return self.method != "full"

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen second copy is in memory. `reference` auto, as in most programs: for full fine-tuning yes, with
        adapters the base itself serves; precomputed log-probabilities take none."""
        compared = self.objective in ("dpo", "ipo", "kto")
        return compared and (self.reference == "copy" or (self.reference == "auto" and not self.adapters))

    @property
    def local_ranks(self) -> int:
        """Ranks that share one host's memory."""
        return min(self.gpus, self.gpus_per_node or 8)

    def at(self, micro_batch: int, grad_accum: int) -> MemoryRequest:
        """The same run with another micro-batch and accumulation. What does not depend on them (`once`) is not worked out again;
        the two numbers are the planner's own and not checked."""
        other, rows = object.__new__(MemoryRequest), micro_batch * self.rows // self.micro_batch
        numbers = {"micro_batch": micro_batch, "grad_accum": grad_accum, "rows": rows, "tokens": rows * self.seq_len}
        other.__dict__.update(self.__dict__, known=self.known, **numbers)
        return other

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryRequest:
        """Read one request of `estimate --json`; a null means "does not apply".

        Raises ValueError for an unknown key (naming the nearest known one) and for a value outside its set.
        """
        values = _known({ALIASES.get(key, key): value for key, value in data.items()}, cls, "")
        if not isinstance(values.get("model"), Mapping):
            raise ValueError("model must be an object with hidden_size, intermediate_size, num_layers and so on")
        values["model"] = ModelDims(**_known(values["model"], ModelDims, "model."))
        targets = values.get("lora_targets")
        if targets == "all-linear":
            values["lora_targets"] = LINEARS
        elif isinstance(targets, str):
            values["lora_targets"] = tuple(part.strip() for part in targets.split(",") if part.strip())
        elif targets is not None:
            values["lora_targets"] = tuple(targets)
        return cls(**values)


def once(count: Callable[[MemoryRequest], T]) -> Callable[[MemoryRequest], T]:
    """`count`, worked out once for a request and its other micro-batches (`MemoryRequest.at`): it must depend on neither rows nor
    accumulation, and never be None. A planner asks for some of these fifteen times in one estimate."""
    key = f"_{count.__module__}.{count.__name__}"

    def known(r: MemoryRequest) -> T:
        kept = r.known
        found: T | None = kept.get(key)
        if found is None:
            found = kept[key] = count(r)
        return found

    return wraps(count)(known)


@lru_cache
def _names(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all fields, those that must be given)."""
    return tuple(f.name for f in fields(cls)), tuple(f.name for f in fields(cls) if f.default is MISSING)


def _known(data: Mapping[str, Any], cls: type, prefix: str) -> dict[str, Any]:
    """The non-null entries of `data`, every key checked against the fields of `cls`."""
    names, required = _names(cls)
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {prefix}{key}; did you mean {prefix}{near}?")
    missing = [name for name in required if data.get(name) is None]
    if missing:
        raise ValueError(f"missing {', '.join(prefix + name for name in missing)}")
    return {key: value for key, value in data.items() if value is not None}
