"""What is exported opens in plain transformers, and holds a tied head once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trebuchet.launcher import cli
from trebuchet.strategies.layouts import Layout
from trebuchet.training.export import cast, stream, written_dtype

if TYPE_CHECKING:
    from trebuchet.training.session import Session


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


@pytest.mark.parametrize(
    ("base", "precision", "written"),
    [
        ("bf16", "bf16-mixed", torch.bfloat16), ("bf16", "fp32", torch.float32), ("bf16", "fp16-mixed", torch.float32),
        ("fp16", "fp16-mixed", torch.float16), ("fp32", "bf16-mixed", torch.float32), ("fp32", "fp32", torch.float32),
    ],
)  # fmt: skip
def test_a_dtype_that_training_did_not_compute_in_is_not_written(
    base: str, precision: str, written: torch.dtype
) -> None:
    plan: Any = SimpleNamespace(model=SimpleNamespace(dtype=base), chosen=SimpleNamespace(precision=precision))
    assert written_dtype(plan) == written


def test_what_was_measured_is_what_is_written(
    tiny_model: Path, tmp_path: Path, session: Callable[..., Session]
) -> None:
    """A base in bf16, trained in fp32 at a rate whose updates bf16 has no numbers for: the files are the trained weights to the bit, and
    plain transformers finds the loss that the run's verdict is about."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    steps = {
        "model.name": str(half),
        "optimization.max_steps": 4,
        "optimization.learning_rate": 1e-5,
        "checkpointing.every": 4,
    }
    run = session(steps)
    assert run.runtime.plan.model.dtype == "bf16" and run.chosen.precision == "fp32"
    assert run.run()
    folder = run.runtime.folder
    written, trained = (
        load_file(folder.model / "model.safetensors"),
        load_file(folder.checkpoint(4) / "trainable.safetensors"),
    )
    assert all(torch.equal(trained[name], tensor) for name, tensor in written.items()) and len(written) > 10
    rounded = sum(torch.equal(trained[name], trained[name].bfloat16().float()) for name in trained)
    assert rounded < len(trained) / 2  # it would have been seen
    assert json.loads((folder.model / "config.json").read_text())["dtype"] == "float32"
    said = json.loads(folder.evaluation.read_text())["after"]["loss"]
    assert cli.main(["eval", str(folder.root)]) == 0
    assert json.loads(folder.evaluation.read_text())["after"]["loss"] == pytest.approx(said, rel=1e-6)
