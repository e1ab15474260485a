"""Tokenizing, masking and packing beside TRL on the same rows in the same minutes; and a million rows curated.

    python benchmarks/data.py tokens [MEGABYTES] [TOKENIZER]     ours, the tokenizer's bare batch call, TRL's SFTTrainer
    python benchmarks/data.py curate [ROWS]                      time, peak memory, what was found of what was planted

Rows are conversations of English sentences (the language reference that comes with Python, shuffled by sentence). CPU seconds count
all threads, so that a machine shared with others says the same; wall seconds stand beside them.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
SMOLLM2 = "~/.cache/trebuchet/models/SmolLM2-135M-Instruct"  # made by examples/smollm2.py
MAX_LENGTH = 4096


def sentences() -> list[str]:
    import pydoc_data.topics as reference

    text = " ".join(" ".join(reference.topics.values()).split())
    return [s for s in re.split(r"(?<=[.!?:]) ", text) if 20 < len(s) < 400]


def rows(megabytes: float, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Prompt and completion as lists of messages, the one layout that both sides mask alike; lengths are lognormal."""
    draw, pool, written = random.Random(seed), sentences(), 0
    while written < megabytes * 1e6:
        question, answer = (
            " ".join(draw.choices(pool, k=max(1, round(draw.lognormvariate(mean, 0.8))))) for mean in (0.7, 1.8)
        )
        written += len(question) + len(answer)
        yield chat(question, answer)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def timed(name: str, work: Callable[[], int]) -> float:
    """Prints and returns tokens per CPU second."""
    wall, cpu = time.perf_counter(), cpu_s()
    tokens = work()
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    print(f"{name:<44} {tokens:>12,} tokens  {wall:7.2f} s  {cpu:7.2f} CPU-s  {tokens / cpu:>9,.0f} tokens/CPU-s")
    return tokens / cpu


def cpu_s() -> float:
    """Of this process and of the children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def tokens(megabytes: float = 20, name: str = SMOLLM2) -> None:
    from transformers import AutoTokenizer

    for module in ("datasets", "trl", "trebuchet.training.data"):  # what both sides import is not timed
        importlib.import_module(module)
    tokenizer = AutoTokenizer.from_pretrained(Path(name).expanduser())
    made = list(rows(megabytes))
    print(f"{len(made):,} rows, {megabytes:g} MB, rows of {MAX_LENGTH} tokens; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        texts = tokenizer.apply_chat_template([r["prompt"] + r["completion"] for r in made], tokenize=False)
        alone = timed("the tokenizer's batch call, text ready", lambda: batch_call(tokenizer, texts))
        ours = timed("trebuchet: read, render, tokenize, mask, pack", lambda: trebuchet(tokenizer, name, file, folder))
        timed("trebuchet: the same from the cache", lambda: trebuchet(tokenizer, name, file, folder))
        theirs = timed("TRL SFTTrainer: render, tokenize, mask, pack", lambda: trl(tokenizer, made, Path(folder)))
    print(f"ours / batch call {ours / alone:.2f}   ours / TRL {ours / theirs:.2f}")


def batch_call(tokenizer: Any, texts: list[str]) -> int:
    backend = tokenizer.backend_tokenizer
    return sum(
        len(e.ids)
        for i in range(0, len(texts), 1000)
        for e in backend.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
    )


def trebuchet(tokenizer: Any, name: str, file: Path, folder: str) -> int:
    from trebuchet.launcher.schema import Data, Objective
    from trebuchet.training.data import prepare

    data = Data.model_validate({"train": [{"path": str(file)}], "eval": 0, "max_length": MAX_LENGTH})
    prepared = prepare(
        data, Objective(), tokenizer=tokenizer, tokenizer_id=name, model_max_length=None,
        cache_dir=Path(folder) / "cache", seed=0,
    )  # fmt: skip
    print(f"  packed {prepared.report.train.packing_efficiency:.1%} full")
    return prepared.report.train.tokens


def trl(tokenizer: Any, made: list[dict[str, Any]], folder: Path) -> int:
    """What SFTTrainer does to a data set when it is built; the model beside it is as small as one can be."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.Dataset.from_list(made).save_to_disk(str(folder / "rows"))
    table = datasets.load_from_disk(str(folder / "rows"))
    tiny = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer)
        )
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_length=MAX_LENGTH, packing=True, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model=tiny, args=config, train_dataset=table, processing_class=tokenizer)
    lengths = trainer.train_dataset.with_format("numpy")["seq_lengths"][:]
    total = sum(int(sum(row)) for row in lengths)
    print(f"  packed {total / (len(lengths) * MAX_LENGTH):.1%} full")
    return total


def curate(count: int = 1_000_000) -> None:
    """Lognormal conversations; 5 % equal to an earlier one and 5 % an earlier answer with every twentieth word replaced."""
    from trebuchet.launcher.schema import Data
    from trebuchet.training.data.curate import curate as decide

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        planted = plant(file, count)
        print(f"{count:,} rows, {file.stat().st_size / 1e6:,.0f} MB; load {os.getloadavg()[0]:.1f}")
        data = Data.model_validate({"train": [{"path": str(file)}], "eval": 0.01, "curate": True})
        for name in ("curate", "the same from the cache"):
            wall, cpu = time.perf_counter(), cpu_s()
            report = decide(data, kind="sft", roles=("assistant",), seed=0, cache=Path(folder) / "cache").report
            wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
            own, child = (
                resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            )
            print(
                f"{name}: {wall:.1f} s, {cpu:.1f} CPU-s, {count / cpu:,.0f} rows/CPU-s, "
                f"peak memory {own:.2f} GiB and {child:.2f} of the largest child"
            )
    print("\n".join(report.lines()))
    print(f"planted: {planted}")


def plant(file: Path, count: int) -> dict[str, int]:
    """Words by Zipf's law out of 50,000, and now and then a sentence that many rows share, as licences and greetings are."""
    import numpy as np

    draw, made, kept = random.Random(0), {"equal": 0, "near": 0}, []
    shared, vocabulary = sentences(), np.array([f"w{i:x}" for i in range(50_000)])
    chance = 1 / np.arange(10, 50_010)
    edges, numbers = np.cumsum(chance / chance.sum()), np.random.default_rng(0)

    def text(mean: float) -> str:
        words = vocabulary[np.searchsorted(edges, numbers.random(max(3, round(draw.lognormvariate(mean, 0.8)))))]
        return " ".join([*words, *([draw.choice(shared)] if draw.random() < 0.1 else [])])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            kind = draw.choices(("new", "equal", "near"), (90, 5, 5))[0] if len(kept) > 100 else "new"
            question, answer = (text(3.0), text(4.3)) if kind == "new" else draw.choice(kept)
            if kind == "near":
                words = answer.split()
                words[::20] = [f"n{draw.randrange(10**6)}" for _ in words[::20]]
                answer = " ".join(words)
            if kind != "new":
                made[kind] += 1
            elif len(kept) < 50_000:
                kept.append((question, answer))
            row = chat(question, answer)
            out.write(json.dumps(row) + "\n")
    return made


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["tokens"]
    {"tokens": lambda: tokens(*map(float, rest[:1]), *rest[1:]), "curate": lambda: curate(*map(int, rest))}[verb]()
