"""Training speed on a CPU against trl.SFTTrainer as it comes: same model, rows, LoRA (r 16, all linear), sequence 512, micro-batch 4.

    pip install 'trl>=1.16' && python benchmarks/cpu_step.py [--steps 6] [--rounds 2]

Both sides run in processes of their own, alternating, so that what else the machine does falls on both. Counted are tokens that
are not padding, over all steps but the first two (which pay for warm-up); peak RSS is the kernel's figure for the process. TRL
comes with its defaults (fp32 weights under bf16 autocast, activation checkpointing, padded rows); ours is `trebuchet run` with its
defaults. What is trained is the same: the answers of the same chat rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("~/.cache/trebuchet/models/SmolLM2-135M-Instruct").expanduser()
LENGTH, MICRO, WARM = 512, 4, 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--trl", metavar="FOLDER", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.trl:
        print(json.dumps(trl(Path(options.trl), options.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows(folder)
        found: dict[str, list[dict[str, float]]] = {"trl": [], "trebuchet": []}
        for turn in range(options.rounds):
            found["trl"].append(child([sys.executable, __file__, "--trl", str(folder), "--steps", str(options.steps)]))
            found["trebuchet"].append(ours(folder, options.steps, turn))
            for side, results in found.items():
                last = results[-1]
                print(
                    f"round {turn + 1}  {side:<10} {last['tokens_per_s']:7.1f} tokens/s   peak RSS {last['rss_gib']:.2f} GiB",
                    flush=True,
                )
    speed = {side: statistics.median(r["tokens_per_s"] for r in results) for side, results in found.items()}
    memory = {side: max(r["rss_gib"] for r in results) for side, results in found.items()}
    faster, larger = (values["trebuchet"] / values["trl"] for values in (speed, memory))
    print(f"median     trebuchet / trl  {faster:.2f} x tokens/s, {larger:.2f} x peak RSS")


def rows(folder: Path) -> None:
    """Chat rows in the prompt-completion layout, which both sides train on the completion of."""
    subprocess.run(
        [sys.executable, ROOT / "examples/stdlib_docstrings.py", folder], check=True, stdout=subprocess.DEVNULL
    )
    out = []
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        out.append(json.dumps({"prompt": [user], "completion": [assistant]}))
    (folder / "rows.jsonl").write_text("\n".join(out) + "\n", encoding="utf-8")


def child(command: list[str]) -> dict[str, float]:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def ours(folder: Path, steps: int, turn: int) -> dict[str, float]:
    output = folder / f"run-{turn}"
    config = {
        "model": str(MODEL),
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0, "max_length": LENGTH},
        "strategy": "lora",
        "optimization": {"global_batch_size": MICRO, "micro_batch": MICRO, "max_steps": steps},
        "checkpointing": {"every": steps},
        "output": str(output),
    }
    (folder / "ours.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "trebuchet.launcher.cli", "run", str(folder / "ours.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if "tokens" in line][WARM:]
    speed = sum(m["tokens"] for m in measured) / sum(m["step_s"] for m in measured)
    return {"tokens_per_s": speed, "rss_gib": max(m["peak_memory_bytes"] for m in measured) / 2**30}


def trl(folder: Path, steps: int) -> dict[str, Any]:
    """SFTTrainer with its defaults; the subclass only counts and times."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    data = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()[: 40 * MICRO]]
    counted: list[tuple[int, float]] = []

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            counted.append((int((inputs["input_ids"].numel() if mask is None else mask.sum())), time.perf_counter()))
            return super().training_step(model, inputs, *rest)

    settings = SFTConfig(
        output_dir=str(folder / "trl"), max_length=LENGTH, per_device_train_batch_size=MICRO, max_steps=steps, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Counting(
        model=str(MODEL),
        args=settings,
        train_dataset=Dataset.from_list(data),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    counted.append((0, time.perf_counter()))
    spans = list(pairwise(counted))[WARM:]
    speed = sum(a[0] for a, _ in spans) / sum(b[1] - a[1] for a, b in spans)
    return {"tokens_per_s": speed, "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


if __name__ == "__main__":
    main()
