"""Shared by all tests: a tiny model, real in every file (config, weights, tokenizer, template), and rows for it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from trebuchet.training.session import Session

# A shell starts what it leaves in the background (`make test &`) deaf to Ctrl+C, and every process below it; some tests press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports them: no test may reach for the network, nor print bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread: the models are tiny, and threads that wait for each other on a busy machine are ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: what fails here fails for everybody. How long drawing them takes says something of the machine.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.fixture(scope="session")
def ray_starts() -> None:
    """Skips where no Ray cluster can be: without the extra, and in a folder with a space, from which Ray itself does not start
    (`cluster up` refuses there: tests/ray_cluster/test_settings.py)."""
    pytest.importorskip("ray", reason="the Ray tests need ray: pip install 'trebuchet[ray]'")
    if " " in sys.executable:
        pytest.skip("Ray does not start from a folder with a space in its name")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden plans anew instead of comparing")


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("north", "river", "stone", "amber", "willow", "copper", "harbour", "lantern")


def chat_rows(count: int = 40) -> list[dict[str, Any]]:
    """Conversations of uneven length with something to learn: the answer is the question's words in reverse."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 3 + j * (i % 5 + 1)) % len(WORDS)] for j in range(1 + i * 7 % 11)]
        question, answer = " ".join([*words, str(i)]), " ".join([str(i), *reversed(words)])
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and hidden size 64 (which NF4's blocks divide) in fp32, with a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny model")  # the space is wanted: users have them
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        [turn["content"] for row in chat_rows() for turn in row["messages"]] + ["user assistant\n"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, dtype="float32",
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", chat_rows())


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenized data of tests never meets the user's."""
    os.environ["TREBUCHET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _floats_as_they_were() -> Iterator[None]:
    """Training in this process switches denormals off for all that follows, and hypothesis rightly refuses to go on."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("held out") / "eval.jsonl", chat_rows(48)[40:])


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, rows_file: Path, held_out_file: Path) -> Callable[..., dict[str, Any]]:
    """A full configuration of a tiny run in fp32, with `{"section.key": value}` changed."""

    def build(changes: Mapping[str, Any] | None = None, **top: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "model": {"name": str(tiny_model), "dtype": "fp32"},
            "data": {"train": str(rows_file), "eval": str(held_out_file), "max_length": 96},
            "strategy": {"method": "full"},
            "optimization": {"global_batch_size": 4, "max_steps": 40, "learning_rate": 1e-3, "warmup": 2},
            # One general prompt: the base samples an answer of 32 tokens to each, a forward pass a token.
            "evaluation": {"every": 20, "generations": 2, "max_new_tokens": 8, "forgetting": 1},
            "checkpointing": {"every": 10, "keep": 2},
        }
        for path, value in (changes or {}).items():
            section, _, key = path.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[key] = value
        return tree | top

    return build


@pytest.fixture
def session(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., Session]:
    """A `Session` of the tiny run in this process, with its run folder, and nothing trained yet."""

    def build(changes: Mapping[str, Any] | None = None, **top: Any) -> Session:
        from accelerate import Accelerator
        from trebuchet.launcher import api
        from trebuchet.training.runtime import Runtime
        from trebuchet.training.session import Session

        output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder, plan = api.begin(tiny_config({"tracking": [], **(changes or {})}, output=str(output), **top))
        (folder.logs).mkdir()
        return Session(Runtime(plan, folder, Accelerator(cpu=True)))

    return build
