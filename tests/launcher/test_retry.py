"""The rungs after out of memory: what changes, that the global batch never does, that there is an end."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher import api, local, record
from trebuchet.launcher.cells import cannot
from trebuchet.launcher.costing import Layout
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.planner import hardware_of
from trebuchet.launcher.retry import lighter, words
from trebuchet.launcher.run_folder import RunFolder

from .test_planner import CPU, MODELS, gpus, plan


def rungs(start: Plan) -> list[Plan]:
    found = [start]
    while (after := lighter(found[-1])) is not None:
        found.append(after)
        assert len(found) < 64
    return found


def test_the_order_of_the_rungs() -> None:
    strategy = {"method": "full", "parallel": "zero3", "checkpointing": "none", "offload": "none"}
    first = plan(
        MODELS[1],
        gpus(2, 80.0, 500.0),
        strategy,
        optimization={"global_batch_size": 12, "micro_batch": 3},
        data={"train": "t", "max_length": 64},
    )
    steps = [
        (c.micro_batch, c.accumulation, c.checkpointing, c.offload) for p in rungs(first) if (c := p.chosen) is not None
    ]
    assert steps == [
        (3, 2, "none", "none"),
        (1, 6, "none", "none"),
        (1, 6, "selective", "none"),
        (1, 6, "full", "none"),
        (1, 6, "full", "optimizer"),
        (1, 6, "full", "params"),
    ]
    second = lighter(first)
    assert second and second.chosen and first.chosen
    assert words(first.chosen, second.chosen) == "micro-batch 1 instead of 3, accumulation 6 instead of 2"
    assert second.reasons[-1] == "out of memory: micro-batch 1 instead of 3, accumulation 6 instead of 2"


@pytest.mark.parametrize("strategy", [{"method": "lora"}, {"method": "full", "parallel": "ddp"}])
def test_no_offload_where_a_layout_does_not_shard_or_the_device_is_a_cpu(strategy: dict[str, str]) -> None:
    on = {"cluster": {"name": "local", "processes": 2}} if strategy.get("parallel") else {}
    last = rungs(plan(MODELS[0], CPU, strategy, **on))[-1].chosen
    assert last and (last.micro_batch, last.checkpointing, last.offload) == (1, "full", "none")


@settings(max_examples=60)
@given(
    st.sampled_from(MODELS[:4]),
    st.sampled_from(["auto", "full", "lora", "qlora"]),
    st.sampled_from(["auto", "fsdp2", "zero3", "ddp"]),
    st.sampled_from(["auto", "none", "selective", "full"]),
    st.sampled_from(["adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit"]),
    st.integers(1, 3),
    st.integers(1, 70),
    st.one_of(st.just("auto"), st.integers(1, 40)),
)
def test_every_rung_keeps_the_global_batch_and_they_end(
    model: str, method: str, parallel: str, checkpointing: str, optimizer: str, ranks: int, batch: int, micro: object
) -> None:
    start = plan(
        model,
        gpus(ranks, 80.0, 500.0),
        {"method": method, "parallel": parallel, "checkpointing": checkpointing},
        optimization={"global_batch_size": batch, "micro_batch": micro, "optimizer": optimizer},
        data={"train": "t", "max_length": 64},
    )
    if start.chosen is None:
        return
    found = rungs(start)
    for before, after in itertools.pairwise(found):
        b, a = before.chosen, after.chosen
        assert b is not None and a is not None and after.config == start.config
        rows = a.micro_batch * a.accumulation * a.ranks
        assert batch <= rows < batch + a.micro_batch * a.ranks  # the user's batch, in the fewest rounds that hold it
        kept = ("method", "parallel", "dp_replicate", "dp_shard", "optimizer", "precision", "learning_rate", "device")
        assert all(getattr(a, name) == getattr(b, name) for name in kept)
        changed = [n for n in ("micro_batch", "checkpointing", "offload") if getattr(a, n) != getattr(b, n)]
        assert len(changed) == 1
        layout = Layout(a.parallel, a.offload, a.dp_replicate, a.dp_shard)
        assert cannot(after.config, after.model, hardware_of(after.config, after.cluster), a.method, layout) is None
        assert Plan.model_validate_json(after.model_dump_json()) == after


def test_between_two_attempts_no_reader_sees_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state that run.json ever had, while ranks that run out of memory three times are started by a real launcher; the ranks
    leave the outcome that real ones leave (tests/launcher/test_out_of_memory.py starts those)."""
    folder, states = RunFolder(tmp_path / "run"), []
    config = {"optimization": {"global_batch_size": 8, "micro_batch": 4}, "data": {"train": "t", "max_length": 64}}
    first = plan(MODELS[0], CPU, {"method": "lora", "checkpointing": "full"}, **config)
    api.fill(folder, first, None)
    outcome = {"exit_code": 1, "error": "out of memory: injected.", "rank": 0, "node": None}
    ranks = f"import pathlib; pathlib.Path({str(folder.outcome)!r}).write_text({json.dumps(outcome)!r})"
    monkeypatch.setattr(local, "command", lambda spec, **more: [sys.executable, "-c", ranks])
    real = record.write_atomically

    def write(path: Path, text: str) -> None:
        real(path, text)
        if path == folder.record:
            states.append(json.loads(text)["state"])

    monkeypatch.setattr(record, "write_atomically", write)
    assert local.execute(folder, first) == 1
    assert states[-1] == "OUT_OF_MEMORY" and set(states[:-1]) == {"PENDING", "RUNNING"}
    attempts = record.read(folder)["attempts"]
    assert [one["state"] for one in attempts] == ["OUT_OF_MEMORY"] * 3
    assert "micro-batch 2 instead of 4, accumulation 4 instead of 2" in attempts[0]["reason"]
    assert attempts[2]["reason"] == "out of memory: injected."
    last = Plan.model_validate_json(folder.plan.read_text())
    assert last.chosen is not None and (last.chosen.micro_batch, last.chosen.accumulation) == (1, 8)
