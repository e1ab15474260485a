"""Bytes that grow with the batch: kept activations and one block's working set in backward.

Counting rule: a tensor counts while something still needs it. PyTorch saves an operation's input only if the gradient
of the other operand is wanted, so a frozen linear layer keeps nothing and an adapter on it keeps its own copy of the
input. The counts below were checked against a tracker of live storages over real transformers and PEFT blocks
(one block, backward included) and reproduce the published slopes of Llama 3 8B in bytes per token to 0.1 %.

Symbols: T tokens of one forward pass, h hidden, f MLP width, q = heads x head_dim, kv = kv_heads x head_dim, V
vocabulary, L layers, e bytes of a hidden-state element (2, or 4 in fp32 and after k-bit preparation, which holds them
in fp32).

One block in backward, gated MLP, no fused SwiGLU; the peak is where the product silu(gate) x up is differentiated:

    gate, up, silu(gate) kept, and the gradients of product, silu(gate) and up      6 f e
    block output as recomputed, and its gradient                                     2 h e
    q, k, v, attention output (k and v repeated to q by sdpa and eager), lse         (2 q + 2 kv) e + 4 heads
    norms: eager fp32 copy of the input each; fused the input of the second          8 h | h e
    full fine-tuning: outputs of both norms, and their inputs normalised (eager)     2 h e | 4 h e
    adapters: mask and dropped copy of the input each                                (1 + copy) d_in
    eager attention at its own softmax: probabilities, gradient, product, result     14 or 16 bytes a score

Left out: the loss (`memory_loss.py`) and anything independent of T (`memory_states.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from .memory_constants import CONSTANTS as C
from .memory_experts import folded, grouped
from .memory_loss import loss_bytes
from .memory_request import MemoryRequest, once
from .memory_states import compute_width, hidden_width, residual_width

FUSED_NORMS = ("ce", "fused", "trebuchet")


class Activations(NamedTuple):
    """Bytes on one GPU.

    `kept` all that forward leaves behind for backward; `kept_last` what of it is still there when the first block's
    backward (the last one) runs; `working` what the block in backward adds; `retained` layer inputs that FSDP1 holds
    on to under a frozen base; `loss` logits and what surrounds them at the loss; `held_logits` what outlives the loss.
    """

    kept: int
    kept_last: int
    working: int
    ending: int
    retained: int
    loss: int
    held_logits: int


class PerToken(NamedTuple):
    """Bytes a token of one block: `kept` for its backward; alive in it at the worst moment of its `mlp` and of its `attention`, and
    at the `end` of the MLP's input gradient; what `checkpointed` blocks keep beside their boundary."""

    kept: float
    mlp: float
    attention: float
    end: float
    checkpointed: float


def activations(r: MemoryRequest) -> Activations:
    """The batch-dependent bytes of one GPU for `r`."""
    layers, t, token = r.model.num_layers, r.tokens, _per_token(r)
    boundary = r.model.hidden_size * residual_width(r) * t
    scores_kept, scores_peak = _scores(r)
    experts, experts_end = folded(r)
    block = token.kept * t + scores_kept + experts
    worst = max(token.mlp * t + scores_kept + experts, token.attention * t + scores_peak)
    ended = token.end * t + scores_kept + _weight_copy(r) + experts_end
    loss, held_logits = loss_bytes(r)
    if r.checkpointing == "none":
        saved = again = block
        mask = 0
    else:
        again = token.checkpointed * t  # counted in `saved` already
        saved = boundary + again
        mask = _mask_elements(r)  # one of bytes for all layers, read again by each
    frozen_fsdp1 = r.parallel == "fsdp1" and r.adapters and r.checkpointing == "full"
    return Activations(
        kept=int(layers * saved) + mask,
        kept_last=int(saved) + mask,
        working=max(int(worst - again), 0),
        ending=max(int(ended - again), 0),
        retained=max(layers - 2, 0) * boundary if frozen_fsdp1 else 0,
        loss=loss,
        held_logits=held_logits,
    )


@once
def _per_token(r: MemoryRequest) -> PerToken:
    m, e = r.model, hidden_width(r)
    h, f, k = m.hidden_size, m.intermediate_size, m.active_experts
    attention = _attention(r) + _norms(r)
    held = _int8_inputs(r)
    again = held + (_selective(r) if r.checkpointing == "selective" else 0)
    if m.experts > 1 and m.fused_experts:
        return PerToken(*grouped(r, attention), checkpointed=again)
    product = f * e if _keeps_input(r, "down") else 0
    down_copies = _adapter_copies(r, ("down",))
    inputs = _adapter_copies(r, ("gate", "up")) + down_copies
    mlp = k * ((2 if _fused_swiglu(r) else 3) * f * e + product + inputs) + _stack_copies(r) + _fused_inputs(r)
    mlp += held
    share = k / m.experts
    wide = residual_width(r)
    ends = (1.0 if r.kernels == "trebuchet" else 2.0) * h * wide  # ours recomputes without the output (not reentrant)
    ends += h * e if wide > e else 0  # the gradient cast for the products, beside that of the residual stream
    if m.experts > 1:  # expert outputs for the router's gradient, the scattered sum, gradients of gathered rows
        mlp += k * h * e
        ends += (2 + 2 * share) * h * e
    during_product = attention + mlp - share * (product + down_copies) + share * _product_transient(r) * f * e
    dropped = f * e if down_copies else 0
    during_down = attention + mlp + share * (f * e + max(dropped, _cast_for_down(r)))
    during_attention = attention + (m.num_heads if r.attention == "eager" else 2 * m.num_heads) * m.head_dim * e
    if r.attention == "eager":  # output, expanded values and o's adapter input are gone when the softmax is reached
        during_attention -= 2 * m.num_heads * m.head_dim * e + _adapter_copies(r, ("o",))
    after_product = attention + mlp + share * (2 * f if r.kernels == "trebuchet" else f) * e
    return PerToken(
        kept=attention + mlp,
        mlp=max(during_product, during_down) + ends,
        attention=during_attention + ends,
        end=after_product + ends,
        checkpointed=again,
    )


def _attention(r: MemoryRequest) -> float:
    """Bytes a token that attention keeps, its scores left out."""
    m, e = r.model, hidden_width(r)
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    litgpt = r.kernels == "chunked-ce"
    packed = 2 * q * e if litgpt and kv == q else 0  # its v is a view of the packed projection, which keeps q and k
    masked = r.attention != "flash" and not litgpt and (r.kernels != "trebuchet" or r.attention == "eager" or r.packed)
    if masked and m.num_kv_heads > 1:
        kv = q  # transformers repeats keys and values for eager attention, and for sdpa with a mask; a single head is expanded
    per_token = (2 * q + 2 * kv) * e + packed + _adapter_copies(r, ("q", "k", "v", "o"))
    return per_token if r.attention == "eager" else per_token + 4 * m.num_heads


def _scores(r: MemoryRequest) -> tuple[float, float]:
    """(bytes of the scores kept, bytes of the scores at the softmax's backward), all rows."""
    e = hidden_width(r)
    if r.attention != "eager":  # sdpa turns a boolean mask into one of numbers, for each call and kept for its backward
        bias = float(e * _mask_elements(r))
        return bias, bias
    scores = float(r.rows * r.model.num_heads * r.seq_len**2)
    kept, peak = (4, C["eager_score_bytes_fp32"]) if e == 4 else (6, C["eager_score_bytes_16bit"])
    if r.model.capped_scores:
        kept += e  # the tanh's result, for its backward
    mask = e * r.rows * r.seq_len**2  # one for all layers
    return kept * scores, peak * scores + mask


def _weight_copy(r: MemoryRequest) -> int:
    """Bytes of the one matrix of the MLP that is expanded from 4 or 8 bits, or cast from fp32 by this project's MLP, while
    its product runs. Nothing where the matrix is used as it is."""
    cast = r.kernels == "trebuchet" and residual_width(r) > hidden_width(r)
    quantized = r.method in ("qlora", "lora8") and not (r.model.fused_experts and r.model.experts > 1)
    m = r.model
    return m.hidden_size * m.intermediate_size * compute_width(r) if cast or quantized else 0


def _mask_elements(r: MemoryRequest) -> int:
    """Elements of the mask [rows, 1, T, T] that keeps packed samples apart: this project's rows under sdpa have one."""
    masked = r.attention == "sdpa" and r.packed and r.kernels == "trebuchet"
    return r.rows * r.seq_len**2 if masked else 0


def _norms(r: MemoryRequest) -> float:
    """Bytes a token that the two norms of a block keep, and what their trainable readers keep."""
    h, e = r.model.hidden_size, hidden_width(r)
    first = 0 if r.checkpointing != "none" else 1  # the block's input is the boundary tensor already
    if residual_width(r) > e:  # fp32 inputs; q, k, v and the MLP's readers each keep a cast of what they read
        readers = 4 if r.kernels == "trebuchet" else 5
        return (1 + first) * 4 * h + (0 if r.kernels in FUSED_NORMS else 8 * h) + readers * e * h
    lean = r.kernels in FUSED_NORMS or e == 4  # keeps inputs only: the second's, the first's where no boundary does
    total = (1 + first) * h * e if lean else 2 * 4 * h
    if not r.adapters:
        total += 2 * h * e * (1 if r.kernels in FUSED_NORMS else 2)
    return total


def _cast_for_down(r: MemoryRequest) -> int:
    """Bytes a token while the adapter on down reads the product in the recomputed forward: PEFT casts a 16-bit input to
    the fp32 of the adapter, and drops from that copy."""
    if not r.adapters or "down" not in (r.lora_targets or ()) or r.kernels == "trebuchet":
        return 0
    if hidden_width(r) == 4 or r.precision == "bf16":
        return 0
    dropout = r.lora_dropout is None or r.lora_dropout > 0
    copies = (2 if dropout else 1) - (1 if r.precision == "fp16" else 0)  # without autocast one of them is kept anyway
    return copies * 4 * r.model.intermediate_size


def _keeps_input(r: MemoryRequest, target: str) -> bool:
    """Whether a projection keeps the tensor it reads itself (not a copy)."""
    if r.kernels == "trebuchet" and target == "down":  # formed again in backward, unless dropout splits the MLP
        return r.adapters and target in (r.lora_targets or ()) and _copies_input(r)
    if not r.adapters or (r.kernels == "chunked-ce" and target == "down"):
        return True
    return target in (r.lora_targets or ()) and not _copies_input(r)


def _copies_input(r: MemoryRequest) -> bool:
    """Whether an eager adapter stores a copy of its input rather than the input."""
    dropout = r.lora_dropout is None or r.lora_dropout > 0
    if dropout:
        return True
    return r.kernels != "trebuchet" and r.precision != "bf16" and hidden_width(r) == 2


def _adapter_copies(r: MemoryRequest, targets: tuple[str, ...]) -> float:
    """Bytes a token that the adapters on `targets` keep of their inputs."""
    chosen = [t for t in targets if r.adapters and t in (r.lora_targets or ())]
    if not chosen:
        return 0.0
    shapes = r.model.linear_shapes
    if not _copies_input(r):  # one shared input for q, k, v and one for gate, up; attention already keeps o's
        if r.kernels == "trebuchet":
            return 0.0
        firsts = {
            ("h" if t in ("q", "k", "v") else "g"): shapes[t][0] for t in chosen if t in ("q", "k", "v", "gate", "up")
        }
        return float(sum(firsts.values()) * hidden_width(r))
    wide = r.precision == "fp16" or (r.precision == "fp16-mixed" and hidden_width(r) == 4)
    copy = 4 if wide or r.precision == "fp32" else 2
    mask = 1 if r.lora_dropout is None or r.lora_dropout > 0 else 0
    if r.kernels == "chunked-ce" and "q" in chosen:  # LitGPT: one dropped copy for the packed q, k, v
        chosen = [t for t in chosen if t not in ("k", "v")]
    total = float(sum(shapes[t][0] for t in chosen) * (copy + mask))
    if r.method == "qlora" and r.kernels in ("ce", "fused") and "o" in chosen:
        total -= shapes["o"][0] * copy  # fused LoRA kernels of those stacks read the attention output in place
    return total


def _fused_inputs(r: MemoryRequest) -> float:
    """Bytes a token: this project's LoRA and MLP operations keep the input they share, beside any dropped copy."""
    if r.kernels != "trebuchet" or not r.adapters:
        return 0.0
    read = 1 + any(target in (r.lora_targets or ()) for target in ("q", "k", "v"))
    return float(read * r.model.hidden_size * hidden_width(r))


def _int8_inputs(r: MemoryRequest) -> float:
    """Bytes a token of the inputs that a block's 8-bit linears hold until their backward.

    bitsandbytes 0.50 keeps each as an attribute of the autograd node and not as a saved tensor, so checkpointing, which replaces
    saved tensors, does not free them (seen: they are alive after a checkpointed forward).
    """
    if r.method != "lora8":
        return 0.0
    m = r.model
    widths = 2 * m.hidden_size + m.num_heads * m.head_dim + m.active_experts * m.intermediate_size
    return float(widths * hidden_width(r))


def _stack_copies(r: MemoryRequest) -> float:
    """Bytes a token kept by the 4-bit linear of the LitGPT stack (chunked-ce): two copies of each input."""
    if r.method != "qlora" or r.kernels != "chunked-ce":
        return 0.0
    m = r.model
    inputs = 3 * m.hidden_size + m.num_heads * m.head_dim + m.intermediate_size
    return float(C["litgpt_qlora_input_copies"] * inputs * hidden_width(r))


def _fused_swiglu(r: MemoryRequest) -> bool:
    return r.kernels == "trebuchet" or (r.kernels == "fused" and r.parallel in ("zero2", "zero3"))


def _product_transient(r: MemoryRequest) -> int:
    """MLP-wide tensors alive beside the kept ones when the gated product is differentiated."""
    if r.kernels == "trebuchet":  # upstream, both gradients, and the product formed again for an adapter on down
        again = not r.adapters or ("down" in (r.lora_targets or ()) and not _copies_input(r))
        return 4 if again else 3
    return 1 if _fused_swiglu(r) else 3  # Liger writes both gradients over its inputs


def _selective(r: MemoryRequest) -> float:
    """Bytes a token that per-operation checkpointing keeps in a block: the attention output and every second matrix product,
    q, v, gate and down; an eager adapter adds two products, of which the wide one is kept as well."""
    m, e = r.model, hidden_width(r)
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    if r.kernels == "trebuchet":  # products with adapters or 4-bit weights on one input are one op, the MLP is none
        fused = r.method != "full" and (r.method != "lora" or set(r.lora_targets or ()) & {"q", "k", "v"})
        mlp = 2 * m.active_experts * m.intermediate_size if r.adapters and _copies_input(r) else 0
        return float((2 * q + (2 if fused else 1) * kv + mlp) * e)
    wide = {"q": q, "v": kv, "gate": m.active_experts * m.intermediate_size, "down": m.active_experts * m.hidden_size}
    eager = r.lora_targets or () if r.adapters and r.kernels != "trebuchet" else ()
    return (q + sum(size * (2 if name in eager else 1) for name, size in wide.items())) * float(e)
