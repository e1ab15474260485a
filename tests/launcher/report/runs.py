"""Run folders as the program's own writer makes them, without training: for pages over many runs and over hostile names."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from trebuchet.launcher import api, record
from trebuchet.launcher.job import JobState
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.run_folder import RunFolder

SET = {"samples": 900, "tokens": 250_000, "trained_tokens": 60_000, "truncated": 3, "no_loss_left": 0, "split": 0, "duplicates": 2,
       "rows": 130, "packing_efficiency": 0.97, "lengths": {}, "histogram": [[64, 120], [128, 500], [256, 280]]}  # fmt: skip


def planned(rate: float, seed: int = 0, model: str = "Qwen/Qwen2.5-0.5B-Instruct") -> Plan:
    optimization = {"learning_rate": rate, "seed": seed, "max_steps": 60}
    return api.plan(
        {
            "model": model,
            "data": "train.jsonl",
            "output": "runs/x",
            "optimization": optimization,
        },
        cluster="rtx4090-1",
    )


def write(
    root: Path, plan: Plan, *, steps: int = 60, state: JobState = JobState.SUCCEEDED, prompt: str = "What?"
) -> RunFolder:
    """One run that trained `steps` steps, stopped once on the way, and was evaluated."""
    folder = RunFolder(root)
    folder.logs.mkdir(parents=True)
    folder.plan.write_text(plan.model_dump_json(indent=1))
    source = {"path": "/data/train.jsonl", "used_for": "train", "layout": "messages", "rows": 900, "tokens": 250_000, "weight": 1.0,
              "spans": {}, "fingerprint": "ab12"}  # fmt: skip
    data = {
        "train": SET,
        "eval": {**SET, "samples": 50},
        "sources": [source],
        "notes": [prompt],
        "max_length": 2048,
        "fingerprint": "ab12cd",
    }
    model = {"name": plan.model.name, "revision": None, "params": plan.model.params}
    record.create(
        folder,
        run=root.name,
        command=["trebuchet", "run", prompt],
        seed=plan.config.optimization.seed,
        model=model,
        data=data,
    )
    half = steps // 2
    record.begin_attempt(folder, "slurm://c/1", ranks=1)
    record.update(folder, step=half, steps=60)
    record.end_attempt(folder, JobState.PREEMPTED, 1, "preempted")
    record.update(folder, attempt={"started": "2026-01-05T08:00:00+0000", "ended": "2026-01-05T10:30:00+0000"})
    record.begin_attempt(folder, "slurm://c/2", ranks=1)
    record.update(folder, attempt={"started": "2026-01-05T11:00:00+0000"})
    noise = random.Random(root.name)
    rate = plan.chosen.learning_rate if plan.chosen else 1e-4
    floor = 1.0 + abs(math.log10(rate) + 4)
    with folder.metrics.open("w") as file:
        for step in range(1, steps + 1):
            loss = floor + 2 * math.exp(-step / 15) + noise.uniform(-0.05, 0.05)
            line: dict[str, Any] = {"step": step, "loss": loss, "lr": rate * min(1, step / 6), "grad_norm": 1 + noise.random(),
                    "tokens": 4096,
                    "trained_tokens": 900, "tokens_per_s": 9000 + noise.uniform(-300, 300), "step_s": 0.4, "epoch": step / 60,
                    "peak_memory_bytes": 9 * 2**30}  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "eval_loss": loss + 0.1,
                            "eval_perplexity": math.exp(loss),
                            "eval_accuracy": 1 / loss,
                        }
                    )
                    + "\n"
                )
    peaks = {"load": 1.1, "forward_backward": 8.9, "optimizer_step": 6.2, "checkpoint_save": 5.9}
    measured = {"what": "allocated", "by_phase": True, "before_gib": 0.0, "phases_gib": peaks}
    record.update(folder, step=steps, measured_memory=measured)
    if state == JobState.RUNNING:
        return folder
    before, after = (
        {"loss": floor + 2.1, "perplexity": 20.0, "accuracy": 0.4},
        {"loss": floor + 0.2, "perplexity": 4.0, "accuracy": 0.6},
    )
    compared = {
        "loss": {
            "before": before["loss"],
            "after": after["loss"],
            "difference": -1.9,
            "low": -2.0,
            "high": -1.8,
            "rows": 50,
            "verdict": "better",
        }
    }
    general: dict[str, Any] = {"before": 3.0, "after": 3.1, "difference": 0.1, "low": -0.1, "high": 0.3, "rows": 8}
    general["verdict"] = "not distinguishable"
    forgetting = {"kl_nats": 0.12, "kl_low": 0.08, "kl_high": 0.2, "prompts": 8, "limit": None, "general": general}
    evaluation = {
        "before": before,
        "after": after,
        "compared": compared,
        "verdict": "better",
        "verdicts": [],
        "forgetting": forgetting,
    }
    samples = [
        {"prompt": f"{prompt} {i}", "base": prompt, "tuned": f"answer {word}", "reference": "ref"}
        for i, word in enumerate(("alpha", "beta", "gamma"))
    ]
    kernels = {
        "applied": True, "backend": "triton", "loss": "token_loss", "attention": prompt, "sharding": "none",
        "launch_table_hash": "ab12", "fused": [{"module": "LlamaRMSNorm", "op": "rms_norm", "count": 48}],
        "skipped": [{"module": "Linear", "reason": prompt, "count": 1, "example": "lm_head"}],
    }  # fmt: skip
    record.update(folder, evaluation=evaluation, kernels=kernels)
    folder.evaluation.write_text(json.dumps({"before": before, "after": after, "samples": samples, **evaluation}))
    record.end_attempt(folder, state, 0, None)
    record.update(folder, attempt={"ended": "2026-01-05T12:30:00+0000"})
    return folder


def write_sweep(root: Path, rates: tuple[float, ...]) -> Path:
    """A sweep over rate and seed, all trials done."""
    points = [{"optimization.learning_rate": rate, "optimization.seed": i % 3} for i, rate in enumerate(rates)]
    for number, (rate, point) in enumerate(zip(rates, points, strict=True)):
        write(root / "trials" / f"{number:03d}", planned(rate, seed=int(point["optimization.seed"])))
    facts = {
        "sweep": root.name, "created": "2026-01-05T08:00:00+0000", "method": "grid", "metric": "eval_loss", "mode": "min", "parallel": 2,
        "space": {"optimization.learning_rate": {"log_uniform": [1e-5, 3e-3]}, "optimization.seed": {"choice": [0, 1, 2]}},
        "trials": points, "nodes": None, "seed": 0, "budget": {"hours": None, "price": None}, "stopping": None,
        "cluster": "rtx4090-1", "scheduler": "local",
    }  # fmt: skip
    (root / "sweep.json").write_text(json.dumps(facts))
    return root
