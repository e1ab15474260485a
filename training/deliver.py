"""`trebuchet export`: what a run made, as a folder or file for others, with a card, and the lines that serve it.

    hf        a whole model in Hugging Face layout; an adapter is merged first, with its proof
    adapter   the adapter folder, which vLLM serves next to others over one base
    vllm      either of them, with serve.sh (Slurm) and serve.yaml (Ray Serve) beside it
    gguf      one file, f16 or q8_0, of a whole model

Nothing is served or submitted here: vLLM is not a dependency, and the lines are printed to be pasted.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..launcher import record
from ..launcher.errors import RunError
from . import gguf_file, proof
from .adapter import digests
from .card import write_card
from .export import readable
from .finished import Finished
from .merge import Options, merge

FORMATS = ("hf", "adapter", "vllm", "gguf")
LEAST_RANK = 8  # vLLM takes ranks of 8, 16, 32, … at most


def export(run: Finished, kind: str, output: Path, *, quant: str = "f16") -> list[str]:
    """Writes `output` (a folder; for gguf a file in it) and returns what to tell. Raises RunError for a taken folder."""
    adapter = run.chosen.method != "full"
    if output.exists():
        raise RunError(f"{output} exists; remove it, or name another folder with --output.")
    if kind == "adapter" and not adapter:
        raise RunError(f"{run.folder.root} trained all weights, so it has no adapter; export it with --format hf.")
    if kind == "hf" and adapter:
        merge(run, output, Options())
        return [f"model   {output}"]
    if kind == "gguf":
        return as_gguf(run, output, quant)
    beside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(run.folder.model, beside)
        write_card(beside, run)
        lines = [f"model   {output}"]
        if kind in ("vllm", "adapter"):
            command = serve_command(run, output)
            (beside / "serve.sh").write_text(slurm_script(run, command), encoding="utf-8")
            (beside / "serve.yaml").write_text(ray_config(run, output), encoding="utf-8")
            lines += [
                f"serve   {shlex.join(command)}",
                f"        sbatch {output / 'serve.sh'}    serve run {output / 'serve.yaml'}",
            ]
        for file in beside.iterdir():
            readable(file)
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    exports = {**(run.record.get("exports") or {}), kind: {"file": str(output), "files": digests(output)}}
    record.update(run.folder, exports=exports)
    return lines


def as_gguf(run: Finished, output: Path, quant: str) -> list[str]:
    source = run.folder.model if run.chosen.method == "full" else run.folder.merged
    if not source.exists():
        raise RunError(f"an adapter is no whole model; merge it first: trebuchet merge {run.folder.root}")
    output.mkdir(parents=True)
    file = output / f"{run.folder.root.name}-{quant}.gguf"
    try:
        found = gguf_file.write(source, file, quant, run.prompts(proof.PROMPTS), run.pad_id)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    write_card(output, run, export=f"Loaded back with transformers: {found.words()}.")
    exports = {**(run.record.get("exports") or {}), f"gguf-{quant}": {"file": str(file), "difference": found.to_json()}}
    record.update(run.folder, exports=exports)
    return [f"model   {file}", f"  read back: {found.words()}"]


def serve_command(run: Finished, folder: Path) -> list[str]:
    if run.chosen.method == "full":
        return ["vllm", "serve", str(folder), "--served-model-name", run.folder.root.name]
    rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512, 1024) if r >= run.plan.config.strategy.lora.r)
    command = ["vllm", "serve", run.plan.config.model.name, "--enable-lora", "--max-lora-rank", str(rank)]
    return [*command, "--lora-modules", f"{run.folder.root.name}={folder}"]


def slurm_script(run: Finished, command: list[str]) -> str:
    """One node, one GPU: what a first try needs; partition and account are the site's."""
    name = shlex.quote(f"serve-{run.folder.root.name}")
    head = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --time=1-00:00:00",
    ]
    return "\n".join([*head, "set -eu", f"exec {shlex.join(command)} --host 127.0.0.1 --port 8000", ""])


def ray_config(run: Finished, folder: Path) -> str:
    """For `serve run`: an application of ray.serve.llm."""
    full = run.chosen.method == "full"
    config: dict[str, Any] = {
        "model_loading_config": {
            "model_id": run.folder.root.name,
            "model_source": str(folder) if full else run.plan.config.model.name,
        },
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    if not full:
        config["lora_config"] = {"dynamic_lora_loading_path": str(folder.parent), "max_num_adapters_per_replica": 16}
        config["engine_kwargs"] = {
            "enable_lora": True,
            "max_lora_rank": max(LEAST_RANK, run.plan.config.strategy.lora.r),
        }
    application = {"name": "llm", "import_path": "ray.serve.llm:build_openai_app", "args": {"llm_configs": [config]}}
    return yaml.safe_dump({"applications": [application]}, sort_keys=False)
