"""Runs `cells.py` in a process of its own, which forks the ranks, and reads back what they saw."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Groups = list[dict[str, Any]]
Run = Callable[[Path, Groups], dict[str, list[dict[str, Any]]]]
CHANGES = {
    "optimization.max_steps": 6,
    "optimization.micro_batch": 1,
    "optimization.weight_decay": 0.1,
    "optimization.schedule": "constant",
    "optimization.warmup": 0,
    "evaluation.generations": 1,
    "evaluation.max_new_tokens": 2,
    "evaluation.forgetting": 0,
    "checkpointing.keep": 9,
}


@pytest.fixture(scope="session")
def run_cells(tiny_config: Callable[..., dict[str, Any]]) -> Run:
    """(folder, groups) -> for each cell what each of its ranks saw."""

    def run(out: Path, groups: Groups) -> dict[str, list[dict[str, Any]]]:
        out.mkdir(exist_ok=True)
        job = {"config": tiny_config({**CHANGES, "tracking": []}), "out": str(out), "groups": groups}
        (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("cells.py")), str(out / "job.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        found: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            ranks = range(group["world"])
            seen = [json.loads((out / f"{group.get('name', len(ranks))}-{rank}.json").read_text()) for rank in ranks]
            for cell in group["cells"]:
                found[cell] = [of_rank[cell] for of_rank in seen]
        return found

    return run


def not_repacked(net: Any) -> Any:
    """Where the CPU has AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward without gradients and multiplies in bf16
    from then on, whatever dtype was asked for: 2e-3 of logits around 0.3 (bitsandbytes 0.50.2). Other CPUs do not."""
    for module in net.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return net


def same_as_exported(cell: dict[str, Any], base: Path) -> None:
    """The newest checkpoint of a cell, read into a model whose trained weights were lost, is the model that the cell left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trebuchet.strategies import trained

    left = Path(cell["model"])
    full = (left / "config.json").exists()
    wanted = AutoModelForCausalLM.from_pretrained(left if full else base, dtype=torch.float32)
    wanted = wanted if full else PeftModel.from_pretrained(wanted, str(left))
    lost = copy.deepcopy(wanted)
    ours = {name: p for name, p in lost.named_parameters() if full or "lora_" in name}
    with torch.no_grad():
        for p in ours.values():
            p.fill_(7.0)
    saved = sorted((left.parent / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    trained.fill(saved[-1], ours)
    found = dict(lost.named_parameters())
    assert len(ours) > 4 and all(torch.equal(found[name], p) for name, p in wanted.named_parameters())
