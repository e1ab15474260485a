"""Model folders on disk: where they are, their `config.json`, and the headers of their safetensors files.

Reads the layout of the Hugging Face cache directly, because importing huggingface_hub costs more than a whole `plan`
may. No weight is read: a safetensors file opens with the JSON that names each tensor's dtype and shape. Left out:
downloading.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError
from .model_families import FAMILIES
from .model_layout import Layout, LinearLayer, read_dims

MAX_HEADER_BYTES = 100_000_000  # the format's own limit, so that a damaged length is not read as one
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# Weights as torch.save writes them; optimizer.pt, training_args.bin and the like beside a model are none.
PICKLE = re.compile(r"(pytorch_model|model|consolidated|adapter_model).*\.(bin|pt|pth|ckpt)|.*\.ckpt")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the safetensors files of a folder hold: tensors by name, and the bytes of the files."""

    tensors: Mapping[str, Tensor]
    bytes: int

    def params(self, *, tied: bool) -> int:
        """Parameters of the model: a tied head that was saved counts once, buffers of old versions not at all."""
        return sum(t.numel for name, t in self.tensors.items() if not _ignored(name, tied))

    @property
    def dtype(self) -> str | None:
        """The dtype most elements have, as bf16, fp16 or fp32; None for any other."""
        weight: dict[str, int] = {}
        for tensor in self.tensors.values():
            weight[tensor.dtype] = weight.get(tensor.dtype, 0) + tensor.numel
        return DTYPES.get(max(weight, key=weight.__getitem__)) if weight else None


def cache_root() -> Path:
    """The Hub cache, found by the variables that huggingface_hub reads, in its order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    return hf_home() / "hub"


def hf_home() -> Path:
    """HF_HOME, or its default."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or os.path.join(base, "huggingface")).expanduser()


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The cached folder of a Hub id that holds a config.json, at `revision` (a branch, a tag or a whole commit)."""
    repo = cache_root() / f"models--{name.replace('/', '--')}"
    reference = repo / "refs" / (revision or "main")
    try:
        commit = reference.read_text().strip()
    except OSError:
        commit = revision or ""
    folder = repo / "snapshots" / commit
    return folder if commit and (folder / "config.json").is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises ModelError that says what the folder holds instead, when there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(_instead(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({error}); copy it again from where the model came from"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type, so it does not describe a transformers model")
    return config


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The headers of all safetensors files of a folder; None when there are none or when some shards are missing.

    Raises ModelError for a damaged file and for a folder whose only weights are pickles or a GGUF file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index} is not a safetensors index; copy it again") from None
        files = [folder / str(name) for name in names]
    else:
        files = [folder / "model.safetensors"]
    if not all(file.is_file() for file in files):
        names = [p.name for p in folder.iterdir()]
        other = any(name.endswith(".gguf") or PICKLE.fullmatch(name) for name in names)
        if other and not any(name.endswith(".safetensors") for name in names):
            raise ModelError(_instead(folder))
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return Checkpoint(tensors=tensors, bytes=sum(file.stat().st_size for file in files))


def read_header(path: Path) -> dict[str, Tensor]:
    """Names, dtypes and shapes of one safetensors file (8 bytes of little-endian length, then JSON)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("header length out of range")
            header = json.loads(file.read(length))
            size = path.stat().st_size - 8 - length
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        if max((t["data_offsets"][1] for t in tensors.values()), default=0) != size:
            raise ValueError("the file is cut short or too long")
        return {k: Tensor(dtype=str(t["dtype"]), shape=tuple(map(int, t["shape"]))) for k, t in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); copy it again") from None


_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx", "seq_length"),
}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.(.+)\.weight$")


def count_checkpoint(config: Mapping[str, Any], checkpoint: Checkpoint) -> Layout:
    """Counts a dense decoder of any family from its tensors: a two-dimensional weight inside a numbered block is a
    linear layer, one of vocabulary size outside is the embedding or the head.

    Raises ModelError for mixtures of experts and models with a vision or audio part, where that rule does not hold.
    """
    kind = config.get("model_type")
    odd = [k for k in ("text_config", "vision_config", "audio_config", "encoder_layers") if config.get(k)]
    odd += [k for k in ("num_experts", "num_local_experts", "n_routed_experts") if (config.get(k) or 1) > 1]
    if odd:
        raise ModelError(
            f"model_type '{kind}' is not supported: its config.json has {odd[0]}, and only dense text decoders can be "
            f"counted from their weights; the families known by name are {', '.join(sorted(FAMILIES))}"
        )
    known = dict(config)
    for key, others in _ALIASES.items():
        known.setdefault(key, next((config[o] for o in others if config.get(o)), None))
    if known["intermediate_size"] is None and isinstance(known["hidden_size"], int):
        # What GPT-2, BLOOM, CodeGen and GPT-J mean by saying nothing; the tensors tell whether it is so.
        wide = 4 * known["hidden_size"]
        if any(_BLOCK.search(name) and wide in tensor.shape for name, tensor in checkpoint.tensors.items()):
            known["intermediate_size"] = wide
    known.setdefault(
        "tie_word_embeddings", not any(n.startswith(("lm_head.", "embed_out.")) for n in checkpoint.tensors)
    )
    dims = read_dims(known, {})
    tied, vocab = dims["tie_word_embeddings"], dims["vocab_size"]
    shapes: dict[tuple[str, int, int], int] = {}
    embedding = 0
    for name, tensor in checkpoint.tensors.items():
        match = _BLOCK.search(name)
        if len(tensor.shape) != 2 or _ignored(name, tied):
            continue
        if match and "emb" not in match[1]:
            shape = (match[1], tensor.shape[1], tensor.shape[0])
            shapes[shape] = shapes.get(shape, 0) + 1
        elif not match and tensor.shape[0] == vocab:
            embedding += tensor.numel
    linears = tuple(
        LinearLayer(name=n, in_features=i, out_features=o, count=c) for (n, i, o), c in sorted(shapes.items())
    )
    if not linears or not embedding:
        raise ModelError(
            f"model_type '{kind}': its safetensors have no numbered blocks with linear layers, so it cannot be planned"
        )
    other = checkpoint.params(tied=tied) - embedding - sum(layer.params for layer in linears)
    return Layout(dims=dims, linears=linears, embedding_params=embedding, other_params=other)


def _ignored(name: str, tied: bool) -> bool:
    if name.endswith(("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")):
        return True
    return tied and name.startswith(("lm_head.", "embed_out."))


def _instead(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    gguf = next((n for n in names if n.endswith(".gguf")), None)
    pickle = next((n for n in names if PICKLE.fullmatch(n)), None)
    if gguf:
        wanted = "give the Hugging Face folder (config.json and safetensors) that it was made from"
        return f"{folder} holds a GGUF file ({gguf}), which is for inference; {wanted}"
    if pickle:
        why = "which is not loaded because it can run code"
        return f"{folder} holds weights only as a pickle ({pickle}), {why}; save the model again as safetensors"
    if "adapter_config.json" in names:
        return f"{folder} holds an adapter, not a model; merge it into its base first, or give the base"
    return f"{folder} has no config.json, so it is not a model in Hugging Face layout"
