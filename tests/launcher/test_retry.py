"""The rungs after out of memory: what changes, that the global batch never does, that there is an end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.cells import cannot
from trebuchet.launcher.costing import Layout
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.planner import hardware_of
from trebuchet.launcher.retry import lighter, words

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
        assert cannot(after.config, hardware_of(after.config, after.cluster), a.method, layout) is None
        assert Plan.model_validate_json(after.model_dump_json()) == after
