"""What is exported opens in plain transformers, and holds a tied head once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trebuchet.strategies.layouts import Layout
from trebuchet.training.export import cast, stream


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


def test_a_stream_holds_one_file_at_a_time(tmp_path: Path) -> None:
    """Of the tensors that a layout gathers, as many bytes live at once as one file takes, and the one that did not fit any more."""
    model = tiny(tied=False)
    alive, most = 0, 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def whole(name_ok: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, most
        for name, tensor in model.state_dict().items():
            if name_ok(name):
                copy = tensor.clone()
                weakref.finalize(copy, gone, copy.nbytes)
                alive += copy.nbytes
                most = max(most, alive)
                yield name, copy
                del copy

    nothing: Any = None
    layout = Layout(
        name="fsdp2", model=model, inside=model, optimizer=nothing, autocast=False, together=True, local_bytes=0, whole_bytes=0,
        accumulating=nothing, backward=nothing, clip=nothing, step=nothing, save=nothing, load=nothing, whole=whole,
        rest=nothing, discard=nothing,
    )  # fmt: skip
    limit = 12_000
    stream(layout, tmp_path, torch.float32, main=True, shard_bytes=limit)
    total = sum(t.nbytes for t in model.state_dict().values())
    largest = max(t.nbytes for t in model.state_dict().values())
    assert most <= limit + largest < total / 2 and len(list(tmp_path.glob("*.safetensors"))) > total // limit
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, opened.state_dict()[name]) for name, t in model.state_dict().items())
