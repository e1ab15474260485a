"""`kill -9` at random moments, also while saving, a full disk, a rank stuck in loading: the run goes on as if nothing had been.

Five kills here; `make soak` sets TREBUCHET_KILLS=25.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("TREBUCHET_KILLS", "5"))
DISK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Killed:
    quiet: Path
    run: Path
    disk: Path | None  # a file system of its own, around `run`
    seen: dict[str, Any]
    logs: str


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small file system, where this user may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tests", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module", params=[False, True] if KILLS > 5 else [True], ids=lambda b: f"background={b}")
def killed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., dict[str, Any]],
    disk: Path | None,
) -> Killed:
    tmp_path = tmp_path_factory.mktemp("kills")
    changes = {
        "strategy.method": "lora",
        "strategy.parallel": "fsdp2",
        "strategy.lora": {"r": 16, "dropout": 0.1},
        "optimization.max_steps": 4 * KILLS + 10,
        "optimization.warmup": 0,
        "evaluation.every": 1000,
        "evaluation.generations": 0,
        "evaluation.max_rows": 1,
        "evaluation.forgetting": 0,
        "checkpointing.every": 1,
        "checkpointing.background": request.param,
        "tracking": [],
    }
    runs = {}
    for name, place in (("quiet", tmp_path), ("run", disk or tmp_path)):
        output = str(place / f"{name}-{request.param}")
        folder, _ = api.begin(tiny_config(changes, output=output, cluster={"name": "local", "processes": 2}))
        folder.logs.mkdir()
        runs[name] = str(folder.root)
    job = {**runs, "disk": disk and str(disk), "kills": KILLS, "seed": 7, "out": str(tmp_path / "seen.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "\n".join(f.read_text()[-2000:] for f in Path(runs["run"], "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    seen = json.loads((tmp_path / "seen.json").read_text())
    return Killed(Path(runs["quiet"]), Path(runs["run"]), disk, seen, logs)


def test_killed_at_any_moment_it_trains_the_same(killed: Killed) -> None:
    seen = killed.seen
    assert seen["end"] == [0, 0], killed.logs
    assert len(seen["kills"]) == KILLS and all(-9 in kill["codes"] for kill in seen["kills"]), seen
    if KILLS > 5:
        assert any(kill["writing"] for kill in seen["kills"]), "no kill hit a save"
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert column(killed.run, key) == column(killed.quiet, key), (key, seen)
    file = "model/adapter_model.safetensors"
    assert (killed.run / file).read_bytes() == (killed.quiet / file).read_bytes()
    assert not list((killed.run / "checkpoints").glob(".step-*"))
    assert checkpoint.latest(RunFolder(killed.run)) == RunFolder(killed.run).checkpoint(4 * KILLS + 10)


def test_a_save_that_is_cut_short_loses_nothing_but_itself(killed: Killed) -> None:
    """Without a disk to fill, by a limit of the kernel on the size of a file. That the run went on to the bit is the test above."""
    full = killed.seen["full"]
    words = "no space left on the device that holds" if killed.disk else "File too large"
    assert full["codes"] != [0, 0] and words in full["error"], full
    # What the cut save had written is gone, and the one before it is there.
    assert full["checkpoints"] and all(name.startswith("step-") for name in full["checkpoints"]), full
    assert 0 < full["valid"] < full["at"] and f"step-{full['at']}" not in full["checkpoints"], full


def test_the_disk_was_full(killed: Killed) -> None:
    if killed.disk is None:
        pytest.skip("this user may not mount a file system to fill; a limit on the size of a file cut the save short")
    assert "trebuchet resume" in killed.seen["full"]["error"]


def test_a_rank_that_never_ends_loading_is_named(killed: Killed) -> None:
    stuck = killed.seen["stuck"]
    assert stuck["codes"] == [1, 1] and stuck["rank"] == 1, stuck
    assert stuck["error"].startswith("hang: loading the model did not end within 10 s. Rank 1 on "), stuck
    assert "is not waiting for others, but is at" in stuck["error"], stuck


def column(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
