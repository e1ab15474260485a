"""Runs that go on: on the same ranks to the bit, on other ranks and in other layouts to rounding."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Run

pytestmark = pytest.mark.slow
# Sums over ranks in another order, fp32, a handful of AdamW steps: 1e-7 to 2e-6 was seen.
OTHER_ORDER = 1e-5
SAME = {
    "fsdp2 full": {"strategy": {"method": "full", "parallel": "fsdp2"}},
    "fsdp2 qlora": {"strategy": {"method": "qlora", "parallel": "fsdp2", "lora": {"r": 4, "dropout": 0.2}}},
    "fsdp2 8-bit": {"strategy": {"method": "full", "parallel": "fsdp2"}, "top": {"optimization": {"optimizer": "adamw-8bit"}}},
    "ddp lora": {"strategy": {"method": "lora", "parallel": "ddp", "lora": {"r": 4, "dropout": 0.2}}},
}  # fmt: skip
# On four ranks: copies of shards, each with 8-bit states of its own; adapters of which half the ranks hold no row.
FOUR = {
    "hsdp 8-bit": {**SAME["fsdp2 8-bit"], "strategy": {"method": "full", "parallel": "fsdp2", "dp_replicate": 2}},
    "thin lora": {"strategy": {"method": "lora", "parallel": "fsdp2", "lora": {"r": 2}}},
}
WORLDS = [(4, "fsdp2"), (2, "fsdp2"), (1, "none"), (3, "fsdp2"), (2, "ddp"), (1, "fsdp2")]
LOSSES = [0.9, 0.5, 0.7, 0.8, 0.6, 0.55]  # held-out losses after each of them, given: the second is the best


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_cells: Run) -> dict[str, list[dict[str, Any]]]:
    two: dict[str, Any] = {}
    four: dict[str, Any] = {}
    for name, cell in (SAME | FOUR).items():
        cells = four if name in FOUR else two
        cells[name] = {**cell, "steps": [0, 6], "save": [3], "background": name != "ddp lora"}
        cells[f"{name} resumed"] = {**cell, "from": name, "steps": [3, 6]}
    eight_bit, saved = SAME["fsdp2 8-bit"], {"steps": [0, 1], "save": [1]}
    ddp = {**eight_bit, "strategy": {"method": "full", "parallel": "ddp"}}
    two["8-bit whole"] = {**ddp, **saved}
    two["8-bit whole, shards"] = {**eight_bit, "from": "8-bit whole", "refused": True}
    two["8-bit shards, whole"] = {**ddp, "from": "fsdp2 8-bit", "refused": True}
    groups: list[dict[str, Any]] = [{"world": 2, "name": "two", "cells": two}]
    other = {**eight_bit, "from": "fsdp2 8-bit", "refused": True}
    groups.append({"world": 1, "name": "one", "cells": {"8-bit other ranks": other}})
    whole = {"steps": [0, 12], "top": {"optimization": {"max_steps": 12}}}
    undisturbed = {m: {**whole, "strategy": {"method": m, "parallel": "fsdp2"}} for m in ("full", "qlora")}
    four |= {f"{m} undisturbed": cell for m, cell in undisturbed.items()}
    groups.append({"world": 4, "name": "whole", "cells": four})
    keep = {**whole["top"], "evaluation": {"best": "loss"}, "checkpointing": {"keep": 1, "keep_best": False}}
    for i, (world, parallel) in enumerate(WORLDS):
        cells = {}
        for method in ("full", "qlora"):
            more = {"top": keep, "figures": {str(2 * i + 2): LOSSES[i]}, "take_best": i == len(WORLDS) - 1}
            part = {**whole, **more, "strategy": {"method": method, "parallel": parallel}, "from": f"{method} moved"}
            cells[f"{method} {i}"] = {**part, "steps": [2 * i, 2 * i + 2], "save": [2 * i + 2]}
        groups.append({"world": world, "name": f"part{i}", "cells": cells})
    return run_cells(tmp_path_factory.mktemp("resume"), groups)


@pytest.mark.parametrize("name", [*SAME, *FOUR])
def test_the_same_ranks_go_on_to_the_bit(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Weights, moments, 8-bit states, random states (dropout), schedule; saved in the background while training went on."""
    for whole, resumed in zip(found[name], found[f"{name} resumed"], strict=True):
        for key in ("losses", "norms", "tokens"):
            assert resumed[key] == whole[key][3:], key
        assert resumed["frozen_bytes"] == whole["frozen_bytes"] and bool(whole["frozen_bytes"]) == ("qlora" in name)
        assert len(set(whole["losses"])) == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("8-bit whole, shards", "8-bit optimizer states of whole parameters, which this layout cannot cut or join"),
        ("8-bit shards, whole", "8-bit optimizer states of shards, which this layout cannot cut or join"),
        ("8-bit other ranks", "8-bit optimizer states of 2 ranks, whose blocks cannot be cut for another number"),
    ],
)
def test_8_bit_states_are_refused_elsewhere(found: dict[str, list[dict[str, Any]]], name: str, words: str) -> None:
    for rank in found[name]:
        assert words in rank["error"] and "resume with" in rank["error"]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_other_ranks_and_layouts_go_on_to_rounding(found: dict[str, list[dict[str, Any]]], method: str) -> None:
    """4 -> 2 -> 1 -> 3 ranks, and DDP and one process in between: the same samples in the same global batches."""
    whole = found[f"{method} undisturbed"][0]
    for i, (world, parallel) in enumerate(WORLDS):
        part = found[f"{method} {i}"]
        assert len(part) == world and (part[0]["kinds"] == ["DTensor"]) == (parallel == "fsdp2")
        if parallel == "fsdp2":  # the 4-bit base is read anew on each number of ranks, and is the same
            assert part[0]["frozen_bytes"] == whole["frozen_bytes"]
        assert part[0]["tokens"] == whole["tokens"][2 * i : 2 * i + 2]
        assert part[0]["losses"] == pytest.approx(whole["losses"][2 * i : 2 * i + 2], rel=OTHER_ORDER), (
            world,
            parallel,
        )
    assert whole["losses"][-1] < whole["losses"][0] - 0.1


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_the_best_outlives_rotation_resumes_and_other_ranks(
    found: dict[str, list[dict[str, Any]]], method: str
) -> None:
    """Saved by two ranks as the second of six checkpoints of which one is kept, taken by one process at the end."""
    (last,) = found[f"{method} {len(WORLDS) - 1}"]
    assert last["best"]["step"] == 4 and last["checkpoints"] == ["step-12", "step-4"]
    assert last["best"]["trained"] == found[f"{method} 1"][0]["trained"] != last["trained"]
