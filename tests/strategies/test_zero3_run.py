"""`trebuchet run` under ZeRO-3 where there is no compiler and no program at all on PATH: a rank is killed, `resume` goes on to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher import cli

LIMIT_S = 300


@pytest.mark.slow
def test_killed_and_resumed_without_a_compiler(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    steps = {"optimization.max_steps": 12, "checkpointing.every": 2, "strategy.method": "lora", "evaluation.every": 6}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny_config(steps, tracking=[])), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trebuchet.launcher.cli", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    process = start("run", "t.yaml", "--set", "cluster.processes=2", "--set", "strategy.parallel=zero3")
    run = tmp_path / "runs" / "t"
    until = time.monotonic() + LIMIT_S
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, out + err

    resumed = start("resume", str(run))
    out, err = resumed.communicate(timeout=LIMIT_S)
    assert resumed.returncode == 0, out + err
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "SUCCEEDED" and record["attempts"][1]["first_step"] >= 2
    assert record["evaluation"]["after"]["loss"] < record["evaluation"]["before"]["loss"]
    assert (run / "model" / "adapter_model.safetensors").exists()
    table = tmp_path / "table.jsonl"
    assert cli.main(["eval", str(run), "--checkpoints", "--output", str(table)]) == 0  # one process reads shards of two
    *checkpoints, model = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert [row["checkpoint"] for row in checkpoints] == [10, 12] and model["checkpoint"] is None
    assert checkpoints[-1]["after"] == pytest.approx(model["after"], rel=1e-6)  # saved when the model was
    assert checkpoints[0]["after"]["loss"] > model["after"]["loss"]
    assert not (tmp_path / "extensions").exists()  # where DeepSpeed would have put what it compiles
