"""Resuming with other ranks or another layout changes how a run is spread and nothing else; and a replay finds what was recorded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import api, cli
from trebuchet.launcher.errors import ConfigError, NothingFits, RunError
from trebuchet.launcher.replan import readable_by, replan
from trebuchet.launcher.run_folder import RunFolder

Config = Callable[..., dict[str, Any]]


def test_other_ranks_keep_what_is_trained(tiny_config: Config) -> None:
    before = api.plan(tiny_config(cluster={"name": "local", "processes": 4}))
    after = replan(before, ["cluster.processes=2", "strategy.parallel=fsdp2"])
    assert before.chosen and after.chosen
    assert (after.chosen.parallel, after.chosen.dp_shard, after.chosen.ranks) == ("fsdp2", 2, 2)
    for key in ("method", "precision", "optimizer", "learning_rate"):
        assert getattr(after.chosen, key) == getattr(before.chosen, key)
    rows = [c.micro_batch * c.accumulation * c.ranks for c in (before.chosen, after.chosen)]
    assert rows == [before.config.optimization.global_batch_size] * 2
    assert "resumed with cluster.processes=2" in after.reasons[-1]


@pytest.mark.parametrize(
    "override", ["optimization.global_batch_size=8", "data.max_length=64", "strategy.method=lora", "model.dtype=bf16"]
)
def test_what_would_train_something_else_is_refused(tiny_config: Config, override: str) -> None:
    with pytest.raises(ConfigError, match="a resumed run trains what it did"):
        replan(api.plan(tiny_config()), [override])


@pytest.mark.parametrize(
    ("before", "changes", "refused"),
    [
        ("fsdp2", ["cluster.processes=2", "strategy.parallel=fsdp2"], True),
        ("fsdp2", ["strategy.parallel=ddp"], True),
        ("fsdp2", ["strategy.parallel=fsdp2", "strategy.dp_replicate=2"], True),
        ("ddp", ["strategy.parallel=fsdp2"], True),
        ("fsdp2", ["strategy.parallel=fsdp2", "strategy.checkpointing=full"], False),
        ("ddp", ["cluster.processes=2", "strategy.parallel=ddp"], False),
    ],
)
def test_8_bit_states_stay_with_their_rows(tiny_config: Config, before: str, changes: list[str], refused: bool) -> None:
    four = {"cluster": {"name": "local", "processes": 4}}
    plan = api.plan(tiny_config({"strategy.parallel": before, "optimization.optimizer": "adamw-8bit"}, **four))
    if refused:
        with pytest.raises(
            ConfigError, match=f"rows of 4 ranks under {before}, and their blocks cannot be cut or joined"
        ):
            replan(plan, changes)
    else:
        assert replan(plan, changes).chosen is not None


def test_what_cannot_be_spread_that_way_is_refused_with_the_reason(tiny_config: Config) -> None:
    plan = api.plan(tiny_config(cluster={"name": "local", "processes": 4}))
    with pytest.raises(NothingFits, match="dp_replicate 3 does not divide 4 ranks"):
        replan(plan, ["strategy.parallel=fsdp2", "strategy.dp_replicate=3"])


@pytest.mark.parametrize(
    ("file", "before", "after", "part"),
    [
        ("zero3-0-of-2.safetensors", "zero3", "fsdp2", "was written under zero3, and strategy.parallel=fsdp2 cannot read it"),
        ("shard-00001-model-00001-of-00001.safetensors", "fsdp2", "zero3", "by another layout than zero3, and strategy.parallel=zero3"),
        ("trainable.safetensors", "ddp", "zero3", "by another layout than zero3, and strategy.parallel=zero3"),
    ],
)  # fmt: skip
def test_zero3_and_the_other_layouts_do_not_read_each_other(
    tmp_path: Path, tiny_config: Config, file: str, before: str, after: str, part: str
) -> None:
    """Refused before anything is started or replaced: the same command without the change still goes on."""
    two = {"cluster": {"name": "local", "processes": 2}, "output": str(tmp_path / "run")}
    folder, _ = api.begin(tiny_config({"strategy.parallel": before, "tracking": []}, **two))
    folder.checkpoint(4).mkdir(parents=True)
    (folder.checkpoint(4) / file).touch()
    plan = folder.plan.read_bytes()
    with pytest.raises(RunError) as refused:
        api.resumable(str(folder.root), [f"strategy.parallel={after}"])
    assert part in str(refused.value) and "Resume without that change" in str(refused.value)
    assert folder.plan.read_bytes() == plan
    kept, decided = api.resumable(str(folder.root), ["cluster.processes=3", f"strategy.parallel={before}"])
    assert decided.chosen and decided.chosen.ranks == 3 and kept.plan.read_bytes() != plan
    readable_by(decided, RunFolder(tmp_path / "empty"))


@pytest.mark.slow
def test_two_ranks_stop_one_goes_on_and_a_replay_agrees(
    tmp_path: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through accelerate: FSDP2 over two ranks, Ctrl+C, one process goes on; then the replay, with the true record and a forged one."""
    run = tmp_path / "run"
    changes = {"strategy.method": "lora", "strategy.parallel": "fsdp2", "optimization.max_steps": 60, "tracking": []}
    changes |= {"checkpointing.every": 20, "evaluation.generations": 1, "evaluation.every": 30}
    tree = tiny_config(changes, output=str(run), cluster={"name": "local", "processes": 2})
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "trebuchet.launcher.cli", "run", str(tmp_path / "t.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 240
    while not losses(run) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=240)[0]
    stopped = json.loads((run / "run.json").read_text())
    assert process.returncode == 130 and 0 < stopped["step"] < 60, out
    checkpoint = run / "checkpoints" / f"step-{stopped['step']}"
    assert len(list(checkpoint.glob("shard-*.safetensors"))) == 2
    assert "Warning" not in out and "Traceback" not in out, out

    assert cli.main(["resume", str(run), "--set", "cluster.processes=1", "--set", "strategy.parallel=none"]) == 0
    recorded = losses(run)
    assert list(recorded) == list(range(1, 61)) and recorded[60] < recorded[1] - 0.1
    capsys.readouterr()
    assert cli.main(["resume", "--verify", "--steps", "3", str(run)]) == 0
    assert "3 steps from the checkpoint of step 40 give the recorded losses to the bit" in capsys.readouterr().out
    assert not (run / "verify").exists() and losses(run) == recorded

    lines = (run / "metrics.jsonl").read_text().splitlines()
    forged = [json.dumps({**(v := json.loads(line)), **({"loss": 1.001 * v["loss"]} if v["step"] == 42 else {})})
              if "grad_norm" in line else line for line in lines]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(forged) + "\n")
    assert cli.main(["resume", "--verify", str(run)]) == 1
    assert "do NOT give the recorded losses" in capsys.readouterr().out


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {v["step"]: v["loss"] for v in map(json.loads, filter(lambda x: x.endswith("}"), lines)) if "loss" in v}
