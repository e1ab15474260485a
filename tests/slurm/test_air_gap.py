"""Compute nodes without a network: what `submit` fetches on a login node that has no torch, and that nothing else is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import record
from trebuchet.launcher.run_folder import open_run

from .cluster import SlurmCluster
from .hub import serve
from .running import finish, said

Config = Callable[..., dict[str, Any]]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its sizes are known without a network; the files are the tiny model's
HEAVY = ("torch", "transformers", "datasets", "numpy")


def submit(folder: Path, cluster: str, blocked: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`trebuchet submit` in a process in which `blocked` cannot be imported."""
    bare = (
        f"import sys; sys.modules.update(dict.fromkeys({tuple(blocked)!r}));"
        "from trebuchet.launcher import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", bare, "submit", "train.yaml", "--cluster", cluster]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TREBUCHET_"))}
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.slow
def test_a_bare_login_node_fetches_what_the_nodes_read(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    """Model, tokenizer and template come from a Hub that the node cannot reach; the run ends as one that had them always."""
    cache = tmp_path / "shared cache"
    few = {"optimization.max_steps": 2, "evaluation.generations": 0}
    config = tiny_config(few, output=str(tmp_path / "run"), model={"name": NAME, "dtype": "fp32"})
    write(tmp_path, config)
    cluster = cluster_file(cache=str(cache))
    with serve(NAME, tiny_model) as (address, given):
        elsewhere = submit(tmp_path, cluster, HEAVY, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
        assert elsewhere.returncode == 2 and f"export HF_HOME={cache}/huggingface" in elsewhere.stderr and not given
        homes = {"HF_HOME": f"{cache}/huggingface", "TREBUCHET_CACHE": f"{cache}/trebuchet"}
        done = submit(tmp_path, cluster, HEAVY, HF_ENDPOINT=address, **homes)
        assert done.returncode == 0, done.stderr
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert wanted <= set(given)
    run = open_run(str(tmp_path / "run"))
    finish(run)
    found = record.read(run)
    assert found["state"] == "SUCCEEDED" and found["step"] == 2, said(run)
    assert found["data"]["train"]["samples"] == 40
    script = run.script.read_text(encoding="utf-8")
    assert "export HF_HUB_OFFLINE=1" in script and f"{cache}/huggingface" in script and "HF_ENDPOINT" not in script
    assert json.loads((run.model / "config.json").read_text())["hidden_size"] == 64


def test_without_the_client_nothing_is_submitted(
    cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    write(tmp_path, tiny_config(output=str(tmp_path / "run"), model={"name": NAME, "dtype": "fp32"}))
    done = submit(tmp_path, cluster_file(), (*HEAVY, "huggingface_hub"), HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2 and "pip install huggingface_hub" in done.stderr and not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer_is_a_sentence(
    cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    write(tmp_path, tiny_config(output=str(tmp_path / "run"), model={"name": NAME, "dtype": "fp32"}))
    homes = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}  # discard: nobody listens
    done = submit(tmp_path, cluster_file(), HEAVY, **homes)
    assert done.returncode == 2 and "could not be downloaded" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_data_that_only_a_network_has_are_refused_before_the_queue(
    cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    write(tmp_path, tiny_config({"data.train": "acme/answers", "data.eval": 0}, output=str(tmp_path / "run")))
    done = submit(tmp_path, cluster_file(), HEAVY)
    assert done.returncode == 2 and "acme/answers is no file here" in done.stderr and not (tmp_path / "run").exists()
