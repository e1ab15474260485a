"""Every combination of method, base, layout, offload, optimizer, checkpointing and device is planned or refused with a reason; and on
this CPU every planned one takes a step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.cluster import Cluster, NodeGroup
from trebuchet.launcher.config import build_config
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.planner import make_plan
from trebuchet.launcher.retry import lighter

from .conftest import Run

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "int8": {"method": "qlora", "quant": {"type": "int8"}},
}
OPTIMIZERS = ("adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit")
PARALLEL = ("none", "ddp", "fsdp2", "zero3")
CHECKPOINTING = ("none", "selective", "full")
OFFLOAD = ("none", "optimizer", "params")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def plan(strategy: dict[str, Any], optimizer: str, device: str, ranks: int, dtype: str = "auto") -> Plan:
    """On a machine so large that memory refuses nothing."""
    gpu = {"gpu": "X", "gpus_per_node": ranks, "gpu_memory_gib": 640.0, "peak_tflops": {"bf16": 100.0, "fp16": 100.0}}
    group = NodeGroup(cores=64, host_memory_gib=4096.0, **(gpu if device == "cuda" else {}))
    config = build_config(
        {
            "model": {"name": NAME, "dtype": dtype},
            "data": {"train": "t", "max_length": 64},
            "strategy": strategy,
            "optimization": {"optimizer": optimizer, "global_batch_size": 8},
            "cluster": {"name": "local", "processes": ranks},
        }
    )
    return make_plan(config, load_model_spec(config.model), Cluster(name="large", groups=(group,)))


@settings(max_examples=400)
@given(
    st.sampled_from(list(METHODS.values())), st.sampled_from(PARALLEL), st.sampled_from(OFFLOAD), st.sampled_from(OPTIMIZERS),
    st.sampled_from(CHECKPOINTING), st.sampled_from(["cpu", "cuda"]), st.integers(1, 4), st.sampled_from(["auto", "fp16", "fp32"]),
)  # fmt: skip
def test_planned_or_refused_with_a_reason(
    method: dict[str, Any],
    parallel: str,
    offload: str,
    optimizer: str,
    checkpointing: str,
    device: str,
    ranks: int,
    dtype: str,
) -> None:
    strategy = {**method, "parallel": parallel, "offload": offload, "checkpointing": checkpointing}
    found = plan(strategy, optimizer, device, ranks, dtype)
    if found.chosen is None:
        assert found.rejected
        for no in found.rejected:
            why = no.reason.partition(": ")[2]
            assert len(why) > 20 and "GiB needed" not in why and "unsupported" not in why
        return
    chosen = found.chosen
    assert (chosen.method, chosen.parallel, chosen.offload) == (method["method"], parallel, offload)
    assert (chosen.optimizer, chosen.checkpointing, chosen.ranks) == (optimizer, checkpointing, ranks)
    # What the ranks cannot do is never asked of them: the layouts and the optimizers say so in their heads.
    if chosen.parallel == "zero3":
        assert chosen.optimizer == "adamw" and chosen.precision != "fp16-mixed"
    if chosen.offload != "none":
        assert chosen.optimizer == "adamw" and chosen.parallel in ("fsdp2", "zero3") and chosen.device == "cuda"
    if chosen.optimizer == "paged-adamw-8bit":
        assert chosen.device == "cuda"
    if method.get("quant"):
        assert chosen.parallel in ("none", "ddp")
    after = lighter(found)
    assert after is None or after.chosen is not None


def cells(ranks: int) -> dict[str, dict[str, Any]]:
    """Every planned cell of a CPU with so many ranks; checkpointing goes round, so that each layout sees each kind."""
    out: dict[str, dict[str, Any]] = {}
    kinds = itertools.cycle(CHECKPOINTING)
    for (name, method), parallel, optimizer in itertools.product(METHODS.items(), PARALLEL, OPTIMIZERS):
        strategy = {**method, "parallel": parallel, "checkpointing": next(kinds), "lora": {"r": 4}}
        if plan(strategy, optimizer, "cpu", ranks, "fp32").chosen is not None:
            top = {"optimization": {"optimizer": optimizer}}
            out[f"{name} {parallel} {optimizer}"] = {"strategy": strategy, "top": top, "steps": [0, 1]}
    return out


def corners(ranks: int) -> dict[str, dict[str, Any]]:
    """Adapters on a head, tied to the embedding here; and adapters of rank 1, of which a second rank holds no row."""
    out: dict[str, dict[str, Any]] = {}
    for parallel in ("none",) if ranks == 1 else ("ddp", "fsdp2", "zero3"):
        for name, lora in {"head": {"r": 4, "targets": ["q_proj", "lm_head"]}, "thin": {"r": 1}}.items():
            optimizer = "adamw" if parallel == "zero3" or name == "head" else "adamw-8bit"
            strategy = {"method": "lora", "parallel": parallel, "lora": lora}
            top = {"optimization": {"optimizer": optimizer}}
            out[f"{name} {parallel}"] = {"strategy": strategy, "top": top, "steps": [0, 2]}
    return out


@pytest.mark.slow
def test_every_planned_cell_takes_a_step(tmp_path_factory: pytest.TempPathFactory, run_cells: Run) -> None:
    one, two = cells(1), cells(2)
    assert len(one) == 24 and len(two) == 24
    one, two = one | corners(1), two | corners(2)
    groups = [{"world": 1, "name": "one", "cells": one}, {"world": 2, "name": "two", "cells": two}]
    found = run_cells(tmp_path_factory.mktemp("cells"), groups)
    assert set(found) == {*one, *two}
    # The first loss and gradient know nothing of layout, optimizer or checkpointing; fp32, sums in another order.
    for name in corners(2):
        alone = found[f"{name.split()[0]} none"][0]
        assert found[name][0]["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
        assert found[name][0]["norms"] == pytest.approx(alone["norms"], rel=1e-4), name
    for method in METHODS:
        those = {name: ranks[0] for name, ranks in found.items() if name.split()[0] == method}
        first = those[f"{method} none adamw"]
        assert first["norms"][0] > 0.1 and len(those) >= 6
        for name, seen in those.items():
            assert seen["losses"] == pytest.approx(first["losses"], rel=1e-5), name
            assert seen["norms"] == pytest.approx(first["norms"], rel=1e-4), name
