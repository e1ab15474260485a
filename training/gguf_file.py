"""A Llama-shaped model folder as one GGUF file, f16 or q8_0, written with the `gguf` package and read back before it is believed.

Llama and Mistral are GGUF's llama, whose query and key rows are interleaved; Qwen2 and Qwen3 have names of their own and keep their
rows. Matrices are stored in the type asked for, vectors in f32. Left out, and refused: other architectures, scaled rotary frequencies,
sliding windows, biases of a llama, tokenizers that are not byte-level BPE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..launcher.errors import ModelError, UserError
from . import proof
from .streamed import Weights, skeleton

# Class in transformers -> (architecture in GGUF, how its tokenizer splits words before BPE)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "default"),
    "MistralForCausalLM": ("llama", "default"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "qwen2"),
}
TYPES = {"f16": "F16", "q8_0": "Q8_0"}
# Largest relative difference of the logits that is the type's own rounding: 11 bits of f16, 8 bits with a scale for 32 of q8_0.
TOLERANCE = {"f16": 5e-3, "q8_0": 1e-1}


def write(folder: Path, output: Path, kind: str, prompts: list[list[int]], pad_id: int) -> proof.Difference:
    """Writes `output` from a Hugging Face folder, loads it back with transformers, and returns how far its logits are; raises
    JobFailed, and leaves no file, when that is more than rounding."""
    beside = output.with_name(f".{output.name}.writing")
    try:
        _write(folder, beside, kind)
        found = check(folder, beside, prompts, pad_id)
        proof.require(found, TOLERANCE[kind], f"the {kind} file")
        beside.rename(output)
    finally:
        beside.unlink(missing_ok=True)
    return found


def check(folder: Path, file: Path, prompts: list[list[int]], pad_id: int) -> proof.Difference:
    """Logits of the file, loaded by transformers, against those of the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    ids, mask = proof.batch_of(prompts, pad_id)
    plain = skeleton(folder)
    reference = proof.logits_of(plain, Weights(folder, plain).get, ids, mask)
    net = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    with torch.inference_mode():
        written = net(input_ids=ids, use_cache=False).logits[mask]
    return proof.compare(reference, written[:, : reference.shape[1]], len(ids))


def _write(folder: Path, output: Path, kind: str) -> None:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need a package: `pip install gguf`.") from None
    model = skeleton(folder)
    config = model.config
    architecture, splitting = refuse(model, folder)
    writer = gguf.GGUFWriter(output, architecture)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(folder.parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0))
    _tokenizer(writer, folder, config.vocab_size, splitting, gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    weights = Weights(folder, model)
    wanted = getattr(gguf.GGMLQuantizationType, TYPES[kind])
    for name, _ in model.named_parameters():
        if name in weights.tied and config.tie_word_embeddings:
            continue
        values = weights.get(name).numpy()
        values = interleaved(name, values, config) if architecture == "llama" else values
        stored = wanted if values.ndim > 1 and values.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None  # the architectures let through have a name for each
        writer.add_tensor(target, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refuse(model: Any, folder: Path) -> tuple[str, str]:
    """(architecture, splitting) of ARCHITECTURES. Raises ModelError for what would be written wrongly."""
    config = model.config
    if type(model).__name__ not in ARCHITECTURES:
        raise ModelError(
            f"GGUF is written for Llama-shaped models (Llama, Mistral, Qwen2, Qwen3); {folder} holds a {type(model).__name__}."
        )
    found = ARCHITECTURES[type(model).__name__]
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default":
        raise ModelError(f"the rotary frequencies of {folder} are scaled ({kind}), which this export does not write.")
    if found[0] == "llama" and any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise ModelError(f"{folder} has biases, which this export does not write for a {type(model).__name__}.")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if windows or (type(model).__name__ == "MistralForCausalLM" and config.sliding_window):
        raise ModelError(f"{folder} attends within a sliding window, which this export does not write.")
    return found


def interleaved(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Query and key: rows i and i + half of each head come to stand side by side (GGUF's llama); all others as they are."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads if "k_proj" in name else 0
    if not heads:
        return values
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def _tokenizer(writer: Any, folder: Path, size: int, splitting: str, gguf: Any) -> None:
    """Byte-level BPE from tokenizer.json, with the template."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if raw.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(raw.get("pre_tokenizer")):
        raise ModelError(f"the tokenizer in {folder} is not byte-level BPE, the only kind that this export writes.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [int(kinds.UNUSED if i not in words else kinds.CONTROL if i in special else kinds.NORMAL) for i in range(size)]
    )
    merges = raw["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    for add, value in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if value is not None:
            add(value)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
