"""Small tokenizers of our own, and a short way to call `prepare` on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trebuchet.launcher.schema import Data, Objective
from trebuchet.training.data import Prepared, prepare

from .kit import CHATML, SPECIAL, wrap, write_jsonl

CORPUS = Path(__file__).resolve().parents[3] / "training" / "data"


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE of 1,000 tokens, trained on the code under test: any text comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(CORPUS.glob("*.py"))], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    """SentencePiece-like, as in Llama 2: spaces as ▁, BOS put in by the tokenizer, text normalized to NFKC."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1400, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(CORPUS.glob("*.py"))], trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    return tokenizer


@pytest.fixture(scope="session")
def chatml(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    return wrap(byte_level, CHATML)


@pytest.fixture(scope="session")
def base(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A base model's tokenizer: no template."""
    return wrap(byte_level, None, eos="<|eos|>")


Prep = Callable[..., Prepared]


@pytest.fixture
def prep(tmp_path: Path) -> Prep:
    """prep(rows, tokenizer, **keys of data): rows go into tmp_path/train.jsonl; without eval unless asked for."""

    def call(
        rows: Iterable[Any] | str,
        tokenizer: Any,
        *,
        objective: str = "sft",
        positions: int | None = None,
        seed: int = 0,
        **data: Any,
    ) -> Prepared:
        path = rows if isinstance(rows, str) else str(write_jsonl(tmp_path / "train.jsonl", rows))
        source: dict[str, Any] = {"path": path}
        source |= {key: data.pop(key) for key in ("format", "columns", "split", "weight") if key in data}
        section = Data.model_validate({"train": [source], "eval": 0, **data})
        return prepare(
            section, Objective(name=objective), tokenizer=tokenizer, tokenizer_id="tiny", model_max_length=positions,
            cache_dir=tmp_path / "cache", seed=seed,
        )  # fmt: skip

    return call
