"""`kill -9` at random moments, also while saving, and a save that the disk cuts short: the run goes on as if nothing had been.

Five kills here; `make soak` sets TREBUCHET_KILLS=25.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("TREBUCHET_KILLS", "5"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True] if KILLS > 5 else [True])
def test_killed_at_any_moment_it_trains_the_same(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], background: bool
) -> None:
    changes = {
        "strategy.method": "lora",
        "strategy.parallel": "fsdp2",
        "strategy.lora": {"r": 16, "dropout": 0.1},
        "optimization.max_steps": 4 * KILLS + 10,
        "optimization.warmup": 0,
        "evaluation.every": 1000,
        "evaluation.generations": 0,
        "evaluation.max_rows": 1,
        "checkpointing.every": 1,
        "checkpointing.background": background,
        "tracking": [],
    }
    runs = {}
    for name in ("quiet", "run"):
        config = tiny_config(changes, output=str(tmp_path / name), cluster={"name": "local", "processes": 2})
        folder, _ = api.begin(config)
        folder.logs.mkdir()
        runs[name] = str(folder.root)
    job = {**runs, "kills": KILLS, "seed": 7, "out": str(tmp_path / "seen.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "\n".join(f.read_text()[-2000:] for f in Path(runs["run"], "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs

    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["end"] == [0, 0], logs
    assert len(seen["kills"]) == KILLS and all(-9 in kill["codes"] for kill in seen["kills"]), seen
    assert seen["full"]["codes"] != [0, 0] and "File too large" in seen["full"]["error"], seen["full"]
    if KILLS > 5:
        assert any(kill["writing"] for kill in seen["kills"]), "no kill hit a save"
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert column(runs["run"], key) == column(runs["quiet"], key), (key, seen)
    file = "model/adapter_model.safetensors"
    assert Path(runs["run"], file).read_bytes() == Path(runs["quiet"], file).read_bytes()
    assert not list(Path(runs["run"], "checkpoints").glob(".step-*"))


def column(run: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
