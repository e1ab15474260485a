"""The largest micro-batch that fits is found without asking every one; here every one is asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.cells import cannot
from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.costing import Layout, memory, request
from trebuchet.launcher.fitting import checkpointings, fit, micro_batches
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.plan import Memory, Rejected
from trebuchet.launcher.planner import METHODS, candidates, hardware_of
from trebuchet.strategies.memory import MemoryRequest, estimate, needs

from .test_planner import CPU, MODELS, gpus


def asked(
    config: Any, model: Any, hardware: Any, method: str, layout: Any
) -> tuple[list[tuple[str, int, Memory]], Memory]:
    """What fits, as (checkpointing, the largest micro-batch, its memory), and the last that was asked; largest first, all of them."""
    fits, last = [], None
    for checkpointing in checkpointings(config):
        for micro in micro_batches(config, hardware):
            last = memory(hardware, estimate(request(config, model, hardware, method, layout, checkpointing, micro)))
            if last.process_gib <= last.usable_gib and last.host_gib <= hardware.host_gib:
                fits.append((checkpointing, micro, last))
                break
    assert last is not None
    return fits, last


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(MODELS),
    st.one_of(
        st.just(CPU),
        st.builds(gpus, st.sampled_from([1, 2, 8]), st.floats(4, 140), st.sampled_from([16.0, 200.0, 2000.0])),
        st.sampled_from(["h100-64", "t4-1", "a100-80gb-16"]).map(load_cluster),
    ),
    st.sampled_from([1, 24, 64, 4096]),
    st.sampled_from([64, 1024, 8192]),
    st.sampled_from(["auto", "full"]),
    st.sampled_from([0.0, 0.1]),
)
def test_the_same_as_asking_for_every_micro_batch(
    name: str, cluster: Any, batch: int, length: int, checkpointing: str, dropout: float
) -> None:
    strategy = {"checkpointing": checkpointing, "lora": {"dropout": dropout}}
    data = {"train": "t", "max_length": length}
    config = build_config(
        {"model": name, "data": data, "strategy": strategy, "optimization": {"global_batch_size": batch}}
    )
    model, hardware = load_model_spec(config.model), hardware_of(config, cluster)
    for method, layout in candidates(config, hardware):
        found = fit(config, model, hardware, method, layout)
        if cannot(config, model, hardware, method, layout):
            assert isinstance(found, Rejected) and found.needed_gib is None
            continue
        fits, last = asked(config, model, hardware, method, layout)
        if isinstance(found, Rejected):
            process = last.process_gib > last.usable_gib
            numbers = (last.process_gib, last.usable_gib) if process else (last.host_gib, hardware.host_gib)
            assert not fits and (found.needed_gib, found.usable_gib) == numbers
        else:
            assert [(one.checkpointing, one.micro_batch, one.memory) for one in found] == fits


@pytest.mark.parametrize(("gib", "most"), [(4.0, 2), (8.0, 6)])
def test_few_are_asked(gib: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven micro-batches of which none fits two are asked; of eleven of which some fit the two ends and log2 of those between."""
    optimization = {"global_batch_size": 4096}
    data, strategy = {"train": "t", "max_length": 16}, {"checkpointing": "full"}
    config = build_config({"model": MODELS[3], "data": data, "strategy": strategy, "optimization": optimization})
    model, hardware = load_model_spec(config.model), hardware_of(config, gpus(1, gib, 500))
    assert len(micro_batches(config, hardware)) == 11
    calls: list[int] = []

    def counted(r: MemoryRequest) -> tuple[int, int, int]:
        calls.append(r.micro_batch)
        return needs(r)

    monkeypatch.setattr("trebuchet.launcher.fitting.weigh", counted)
    for method in METHODS:
        calls.clear()
        fit(config, model, hardware, method, Layout("none", "none", 1, 1))
        assert len(calls) <= most and len(set(calls)) == len(calls)
