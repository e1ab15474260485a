"""Tiny models of any family, and mixtures of experts as folders of the Hub hold them: one tensor an expert, in files that cut through a
block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

EXPERTS = 3  # which two ranks cannot share evenly
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    # A dense block between, whose MLP has the names of experts.
    "qwen3_moe": {
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3, "mlp_only_layers": [1],
    },
}  # fmt: skip


def save(folder: Path, family: str, tokenizer: Path, *, one_by_one: bool = True, **more: Any) -> Path:
    """A model of `family` with random weights, with the tokenizer of another folder. `more` stands in its config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(
        family, **{**SIZES, **FAMILIES.get(family, {}), **more}, vocab_size=len(words), dtype="float32", **ids
    )
    torch.manual_seed(0)
    net: Any = AutoModelForCausalLM.from_config(config)
    for parameter in net.parameters():  # experts as transformers starts them would be alike, and biases zero
        torch.nn.init.normal_(parameter, 0.02, 0.05)
    net.save_pretrained(folder, max_shard_size=60_000, save_original_format=one_by_one)
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder
