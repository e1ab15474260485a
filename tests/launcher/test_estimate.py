"""`trebuchet estimate` from flags and from a file: the keys that machines read, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trebuchet.launcher.cli import main

KEYS = {"peak_allocated_gib", "peak_reserved_gib", "process_gib", "host_gib", "phases", "components"}
SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def test_flags_and_file_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "lora", "--lora-r", "8", "--lora-targets", "q,v", "--seq-len", "4096", "--micro-batch", "2"]
    flags += ["--precision", "bf16-mixed", "--kernels", "ce", "--accumulation", "4", "--lora-dropout", "0"]
    assert main(["estimate", "--model", "meta-llama/Llama-3.1-8B", *flags]) == 0
    (of_flags,) = json.loads(capsys.readouterr().out)
    request = {
        "model": SIZES, "method": "lora", "lora_r": 8, "lora_targets": ["q", "v"], "seq_len": 4096, "micro_batch": 2,
        "precision": "bf16-mixed", "kernels": "ce", "accumulation": 4, "lora_dropout": 0.0, "objective": "sft", "double_quant": None,
    }  # fmt: skip
    file = tmp_path / "requests.json"
    file.write_text(json.dumps([request, {**request, "micro_batch": 4}]))
    assert main(["estimate", "--json", str(file)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert set(of_flags) == set(first) == KEYS
    assert first == of_flags and second["peak_allocated_gib"] > first["peak_allocated_gib"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes either --json FILE, or --model NAME"),
        (["--json", "x", "--model", "y"], "takes either"),
        (["--json", "x", "--gpus", "2"], "--gpus goes with --model"),
        (["--json", "gone.json"], "cannot read gone.json"),
        (["--model", "Llama-3.1-8B", "--method", "dora"], "must be one of full, lora, qlora"),
        (["--model", "Llama-3.1-8B", "--gpus", "3", "--dp-replicate", "2"], "must divide gpus"),
    ],
)
def test_wrong_requests_are_one_paragraph(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and len(shown.err.splitlines()) == 1
