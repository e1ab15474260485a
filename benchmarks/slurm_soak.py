"""Four nodes, eight gloo ranks of SmolLM2-135M with LoRA, preempted three times: the loss curve of an undisturbed run, to the bit?

    python benchmarks/slurm_soak.py [--steps N] [--json FILE]

A real Slurm of this machine, four slurmd with two ranks each; a job of the higher partition takes all nodes after a quarter, a half
and three quarters of the steps. Compared are loss, gradient norm and learning rate of every step, the held-out loss after training,
and the bytes of the adapter. fp32 everywhere, because a CPU without bf16 instructions would train in it anyway; rows are short, so that
two cores can serve eight ranks; about 1.3 GiB of memory a rank. Left out: full fine-tuning (tests/slurm does it with a tiny model).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

from slurm_here import ROOT, cluster_file, preempt, slurm_here, wait_for_step
from trebuchet.launcher import api, logs, record
from trebuchet.launcher.run_folder import RunFolder

COMPARED = ("loss", "grad_norm", "lr", "tokens")
ROWS = 96


def main(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    model = smollm2.make(smollm2.DEFAULT.expanduser())
    found: dict[str, Any] = {"steps": arguments.steps}
    with slurm_here() as (cluster, folder):
        write_rows(folder / "rows.jsonl")
        file = str(cluster_file(folder, "low", nodes=4, host_memory_gib=8))
        whole = run(folder, model, file, "whole", arguments.steps)
        found["undisturbed_s"] = finish(whole)
        disturbed = run(folder, model, file, "disturbed", arguments.steps)
        began = time.time()
        for attempt in (1, 2, 3):
            here = wait_until(disturbed, attempt, attempt * arguments.steps // 4)
            print(f"attempt {attempt}: preempted after step {here}", flush=True)
            preempt(cluster)
        finish(disturbed)
        found["disturbed_s"] = time.time() - began
        found |= compare(whole, disturbed)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not found["equal"])


def run(folder: Path, model: Path, cluster: str, name: str, steps: int) -> RunFolder:
    rows = {"path": str(folder / "rows.jsonl"), "format": "text"}
    tree = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": {"train": rows, "eval": 0.1, "max_length": 32},
        "objective": "pretrain",
        "strategy": {"method": "lora", "parallel": "ddp"},
        "optimization": {"global_batch_size": 8, "max_steps": steps, "learning_rate": 1e-3},
        "evaluation": {"every": steps, "generations": 0, "forgetting": 0},
        "checkpointing": {"every": max(1, steps // 6), "keep": 2},
        "tracking": [],
        "output": str(folder / name),
        "cluster": {"name": cluster, "processes": 2},
    }
    return RunFolder(api.submit(tree).folder)


def write_rows(file: Path) -> None:
    """What functions of the standard library say of themselves in their first line."""
    lines = []
    for module in pkgutil.iter_modules([str(Path(os.__file__).parent)]):
        if module.name in (
            "json",
            "shutil",
            "os",
            "textwrap",
            "tempfile",
            "random",
            "statistics",
            "calendar",
            "inspect",
        ):
            loaded = __import__(module.name)
            for name, function in sorted(inspect.getmembers(loaded, inspect.isfunction)):
                if text := inspect.getdoc(function):
                    lines.append(f"{module.name}.{name}: {text.splitlines()[0]}")
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:ROWS]), encoding="utf-8")


def wait_until(folder: RunFolder, attempt: int, step: int) -> int:
    """Until `attempt` has come to `step`, counted from the run's beginning."""
    wait_for_step(folder, attempt, 0)
    while True:
        done: int = record.read(folder)["step"]
        if done >= step:
            return done
        wait_for_step(folder, attempt, step - record.read(folder)["attempts"][-1]["first_step"])


def finish(folder: RunFolder) -> float:
    began = time.time()
    for _ in logs.lines(folder, follow=True):
        pass
    found = record.read(folder)
    if found["state"] != "SUCCEEDED":
        sys.exit(f"{folder.root} {found['state']}: {found['error']}")
    return time.time() - began


def compare(whole: RunFolder, disturbed: RunFolder) -> dict[str, Any]:
    curves, weights = [], []
    for folder in (whole, disturbed):
        rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
        curves.append({row["step"]: [row[key] for key in COMPARED if key in row] for row in rows if "loss" in row})
        weights.append((folder.model / "adapter_model.safetensors").read_bytes())
    after = [record.read(folder)["evaluation"]["after"]["loss"] for folder in (whole, disturbed)]
    attempts = record.read(disturbed)["attempts"]
    return {
        "attempts": [{key: one.get(key) for key in ("kind", "first_step", "last_step", "nodes")} for one in attempts],
        "one_job": len({one["handle"] for one in attempts}) == 1,
        "first_and_last_loss": [curves[0][1][0], curves[0][max(curves[0])][0]],
        "steps_compared": len(curves[0]),
        "different_steps": [step for step in curves[0] if curves[0][step] != curves[1].get(step)],
        "held_out_loss": after,
        "adapter_bytes_equal": weights[0] == weights[1],
        "equal": curves[0] == curves[1] and weights[0] == weights[1] and after[0] == after[1] and len(attempts) == 4,
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    sys.exit(main(parser.parse_args()))
