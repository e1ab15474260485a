"""What is exported opens in plain transformers, and holds a tied head once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trebuchet.training.export import cast


def tiny(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def test_a_tied_head_is_saved_once_and_opens_equal(tmp_path: Path) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path, state_dict=cast(model, torch.bfloat16))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (safe_open is not a mapping)
    ids = torch.arange(10)[None]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(opened(ids).logits, model.to(torch.bfloat16)(ids).logits)


def test_an_untied_head_is_kept_and_the_model_is_not_changed(tmp_path: Path) -> None:
    model = tiny(tied=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = cast(model, torch.bfloat16)
    assert state["lm_head.weight"].data_ptr() != state["model.embed_tokens.weight"].data_ptr()
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
