"""Out of memory in a real run: all ranks end together, the next attempt is lighter, the global batch stays; a rank that stops; one that is
killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher.plan import Plan

pytestmark = pytest.mark.slow
INJECT = Path(__file__).resolve().parent.parent / "inject"
LIMIT_S = 400
ENDLESS = {"optimization.max_steps": 100000, "data.eval": 0.0, "checkpointing.every": 1.0}
TWO = {"cluster": {"name": "local", "processes": 2}, "tracking": []}


def start(folder: Path, tree: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    (folder / "t.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    paths = os.pathsep.join(filter(None, (str(INJECT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "trebuchet.launcher.cli", "run", "t.yaml"],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_half_the_micro_batch_until_it_fits(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    """Rank 1 alone runs out, by the real error of torch's CPU allocator: rank 0 is in a collective then."""
    changes = {"optimization.global_batch_size": 8, "optimization.micro_batch": 4, "optimization.max_steps": 3}
    tree = tiny_config({**changes, "data.eval": 0.0}, **TWO)
    process = start(tmp_path, tree, TREBUCHET_TEST_OOM="1:1")
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out + err
    assert (
        "Traceback" not in out + err and "elastic" not in out + err
    )  # no frame of torchrun's around what a rank has said
    run = tmp_path / "runs" / "t"
    found = record_of(run)
    assert [a["state"] for a in found["attempts"]] == ["OUT_OF_MEMORY", "OUT_OF_MEMORY", "SUCCEEDED"]
    first, second, _ = (a["reason"] for a in found["attempts"])
    assert "can't allocate memory" in first and "micro-batch 2 instead of 4, accumulation 2 instead of 1" in first
    assert "micro-batch 1 instead of 2, accumulation 4 instead of 2" in second
    plan = Plan.model_validate_json((run / "plan.json").read_text())
    assert plan.chosen and (plan.chosen.micro_batch, plan.chosen.accumulation) == (1, 4)
    assert plan.config.optimization.global_batch_size == 8
    assert "this rank ends with another: rank 1: out of memory" in (run / "logs" / "rank-0.log").read_text()
    assert "Connection closed by peer" not in (run / "logs" / "rank-0.log").read_text()
    words = [sys.executable, "-m", "trebuchet.launcher.cli", "status", str(run)]
    status = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "attempt 1" in status and "micro-batch 2 instead of 4" in status and "attempt 3" in status

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    process = start(undisturbed, tree)
    assert process.wait(LIMIT_S) == 0
    # The same rows in the same global batches; fp32 sums in another order.
    assert losses(run) == pytest.approx(losses(undisturbed / "runs" / "t"), rel=1e-5)


def test_nothing_lighter_is_the_end(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    """With the error of the CUDA allocator; micro-batch 1 does not fit whatever is checkpointed."""
    changes = {"optimization.global_batch_size": 2, "optimization.micro_batch": 1, "data.eval": 0.0}
    tree = tiny_config({**changes, "strategy.checkpointing": "selective"}, tracking=[])
    process = start(tmp_path, tree, TREBUCHET_TEST_OOM="0:0:cuda")
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, out + err
    found = record_of(tmp_path / "runs" / "t")
    assert [a["state"] for a in found["attempts"]] == ["OUT_OF_MEMORY", "OUT_OF_MEMORY"]
    assert "checkpointing full instead of selective" in found["attempts"][0]["reason"]
    assert found["error"].startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB")


def after_three_steps(process: subprocess.Popen[str], run: Path) -> psutil.Process:
    """Rank 1."""
    until = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"][-1]


def test_a_rank_that_stops_in_a_step_is_named(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    process = start(tmp_path, tiny_config(ENDLESS, **TWO), TREBUCHET_HANG_S="8")
    run = tmp_path / "runs" / "t"
    rank = after_three_steps(process, run)
    rank.suspend()
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, out + err
    found = record_of(run)
    assert found["state"] == "FAILED" and "hang: no step for 8 s" in found["error"]
    assert "Without a word: rank 1" in found["error"]
    flight = json.loads((run / "logs" / "flight-0.json").read_text())
    assert any("all_reduce" in json.dumps(entry) for entry in flight["entries"])
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_a_rank_that_is_killed_is_named(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    """The rank that waited for it knows nothing of it; torchrun does, and its forty lines are not printed."""
    process = start(tmp_path, tiny_config(ENDLESS, **TWO))
    run = tmp_path / "runs" / "t"
    after_three_steps(process, run).kill()
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, out + err
    found = record_of(run)
    assert found["state"] == "FAILED" and found["error"].startswith("rank 1 was ended by SIGKILL, as the kernel")
    assert f"Last lines of {run / 'logs' / 'rank-1.log'}" in found["error"]
    assert found["error"] in err and "Traceback" not in out + err and "elastic" not in out + err
